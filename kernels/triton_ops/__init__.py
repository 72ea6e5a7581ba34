"""The ops of `reference` as Triton kernels, one op a file, with the same names and signatures.

An op that is missing here runs from `reference`. Nothing in this folder may be imported where triton is missing, so
`deltakv_hf.dispatch` imports each file when its op is first used.
"""
