"""What the errors of frameworks mean: memory that ran out, or a device that is lost."""

import pytest

from treeflash.errors import first_line, is_device_lost, is_of_earlier_work, is_out_of_memory

# As PyTorch 2.13 (c10/cuda, ATen/cuda, NCCL), Triton 3.9 and MLX 0.32 word them.
LOST = (
    "CUDA error: an illegal memory access was encountered\nSearch for `cudaErrorIllegalAddress'",
    "CUDA error: device-side assert triggered",
    "CUDA error: unspecified launch failure",
    "CUDA error: uncorrectable ECC error encountered",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`",
    "NCCL error: unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
    "Triton Error [CUDA]: an illegal memory access was encountered",
    "rank 0 failed in the middle of a forward pass, in which the other ranks still wait; "
    "restart torchrun",
)
OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.99 GiB",
    "CUDA error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
    "[malloc] Unable to allocate 1073741824 bytes.",
    "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed "
    "buffer size of 8 bytes.",
    "[metal::malloc] Resource limit (499000) exceeded.",
)
OTHER = ("mat1 and mat2 shapes cannot be multiplied", "NVIDIA driver on your system is too old")
# As CUDA 13.2 words its errors 900 to 908.
CAPTURES = (
    "operation not permitted when stream is capturing",
    "operation failed due to a previous error during capture",
    "operation would result in a merge of separate capture sequences",
    "capture was not ended in the same stream as it began",
    "capturing stream has unjoined work",
    "dependency created on uncaptured work in another stream",
    "operation would make the legacy stream depend on a capturing blocking stream",
    "operation not permitted on an event last recorded in a capturing stream",
    "attempt to terminate a thread-local capture sequence from another thread",
)


@pytest.mark.parametrize(
    ("message", "lost", "out_of_memory"),
    [
        *((message, True, False) for message in LOST),
        *((message, False, True) for message in OUT_OF_MEMORY),
        *((message, False, False) for message in OTHER),
        *((f"CUDA error: {message}", False, False) for message in CAPTURES),
        (f"Triton Error [CUDA]: {CAPTURES[0]}", False, False),
    ],
)
def test_a_fault_of_a_gpu_loses_the_device_and_a_failed_allocation_is_memory_alone(
    message, lost, out_of_memory
):
    assert is_device_lost(RuntimeError(message)) == lost
    assert is_out_of_memory(RuntimeError(message)) == out_of_memory
    # An error of another type is one of the program.
    assert not is_device_lost(ValueError(message))
    assert not is_out_of_memory(ValueError(message))


# As macOS words them, and MLX 0.32 after "[METAL] Command buffer execution failed: ".
METAL = {
    "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)": False,
    "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)": True,
    "Caused GPU Hang Error (00000003:kIOGPUCommandBufferCallbackErrorHang)": True,
    "Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)": (
        False
    ),
    "Discarded (victim of GPU error/recovery) (00000005:kIOGPU...ErrorInnocentVictim)": False,
    "Ignored (for causing prior/excessive GPU errors) (00000004:kIOGPU...SubmissionsIgnored)": True,
}


@pytest.mark.parametrize("text", METAL)
def test_an_error_of_a_command_buffer_loses_the_device_or_belongs_to_earlier_work(text):
    error = RuntimeError(f"[METAL] Command buffer execution failed: {text}.")
    assert is_device_lost(error) == METAL[text]
    assert is_of_earlier_work(error) != METAL[text]


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("ptxas is missing\nTraceback", "ptxas is missing"),
        ("at 3:4:\n    x = y\n        ^\nNameError('y')\n", "at 3:4: NameError('y')"),
        ("at 3:4:", "at 3:4:"),
        ("", "ValueError"),
    ],
)
def test_the_first_line_says_what_went_wrong(message, line):
    assert first_line(ValueError(message)) == line
