"""What both frameworks share of a mechanism: its index maths, its checks and its plain float64 judge. numpy only.

One file a mechanism, beside ``jax/mechanisms/NAME.py`` and ``nn/layer/NAME.py``. A function that takes ``xp`` runs on
numpy and jax.numpy alike; one that uses operators only also runs on MindSpore tensors.
"""
