"""The CANN custom-operator package of the Ascend 910 and 310P kernels, generated from the kernels' own argument lists.

    python -m flash_attention_infer.ascend_package --out DIR [--soc ascend910 ascend310p]

operators.py (four operators, read from the signatures) -> cpp.py (operator prototypes, ONNX plugin), project.py (the
other files, the kernel sources, ``write_package``). Generated files are checked by tests; none was run on a device.
"""
