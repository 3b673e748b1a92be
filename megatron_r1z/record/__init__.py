"""What a run leaves behind: figures, responses, receipts, the certificate, advice.

`metrics`, `rollouts`, `receipts` and `certificate` are what the loops use, `result_files` and `tables` what every writer does.
"""
