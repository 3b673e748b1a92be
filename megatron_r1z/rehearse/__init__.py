"""A rank of a run on a machine without a GPU: the real Megatron, Transformer Engine and vLLM, and no kernel.

Tensors are torch's FakeTensors on a device that is pretended: they have shapes, formats and lifetimes, and no numbers. Everything between
the libraries is their own code, of the versions that `versions.py` names, so it refuses what it would refuse on a GPU, warns of what it
would warn of, and what is alive at a time is what would be. What cannot be seen this way: whether a kernel takes what it is given, what it
computes, how long it takes, and how ranks talk to each other.

    native.py, driver.c, runtime.c    libraries in place of NVIDIA's, without a device
    device.py                         `torch.cuda`
    world.py                          process groups: one process plays one rank of many
    engine_module.py, bindings.json   `transformer_engine_torch`, the compiled part of Transformer Engine, as names and enums
    kernels.py                        shapes of what its kernels give
    live.py                           bytes that are alive
    policy_role.py, engine_role.py    what a policy rank and an engine rank do; programs, each in a process of its own
    roles.py                          which roles a configuration has, and their processes
    versions.py                       for which versions of the libraries all this was written
"""
