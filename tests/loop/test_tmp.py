def test_a(base, task, cli, tmp_path):
    import shutil
    shutil.copytree(base.parents[1], "/tmp/looptests/base", dirs_exist_ok=True)
    shutil.copytree(task, "/tmp/looptests/task", dirs_exist_ok=True)
