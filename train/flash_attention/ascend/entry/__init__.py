"""Where CANN enters: kernels by operator name, as its compile processes ask for them.

KernelRequest (what the kernel is built for, as text) -> operator name -> ``flash_attention_tik.py``, which those
processes import by its path -> ``build_operator`` -> forward.py, preprocess.py or backward.py.
"""
