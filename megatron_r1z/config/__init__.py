from megatron_r1z.config.schema import *
