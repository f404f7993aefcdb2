"""The GPU kernels, in Triton: `kernels` the code, `tuning` its block sizes, `launch` the calls."""
