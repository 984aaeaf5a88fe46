"""What is allowed of Winograd's GPU kernels; apart, as `bench/gpu_verify.py` asks for it too."""

import torch

# Largest errors of the GPU kernels for outputs of about 1, by alpha: about twice what was seen. The
# rounding of V to 16 bits counts for most of it, and one wrong product of many channels for more.
BOUNDS = {
    torch.float32: {4: 4e-6, 6: 1e-5, 8: 6e-5},
    torch.float16: {4: 6e-3, 6: 6e-2, 8: 2e-1},
    torch.bfloat16: {4: 5e-2, 6: 3e-1, 8: 1.2},
}
