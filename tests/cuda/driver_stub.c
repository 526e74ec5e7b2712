/* Stands in for NVIDIA's libcuda.so.1, so that vLLM's CUDA build can be imported without a GPU: every function of the driver that
   the build binds returns CUDA_ERROR_NO_DEVICE. With CUDA_STUB_CALLS set to a file, each call appends the function's name. */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int no_device(const char *name) {
    const char *path = getenv("CUDA_STUB_CALLS");
    int file = path ? open(path, O_WRONLY | O_CREAT | O_APPEND, 0600) : -1;
    if (file >= 0) {
        (void)!write(file, name, strlen(name));
        (void)!write(file, "\n", 1);
        close(file);
    }
    return 100;
}

#define STUB(name) int name(void) { return no_device(#name); }
STUB(cuCtxGetCurrent)
STUB(cuCtxSetCurrent)
STUB(cuDeviceGetAttribute)
STUB(cuDevicePrimaryCtxRetain)
STUB(cuDriverGetVersion)
STUB(cuGetErrorString)
STUB(cuGetProcAddress_v2)
STUB(cuInit)
STUB(cuMemAddressFree)
STUB(cuMemAddressReserve)
STUB(cuMemCreate)
STUB(cuMemGetAllocationGranularity)
STUB(cuMemMap)
STUB(cuMemRelease)
STUB(cuMemSetAccess)
STUB(cuMemUnmap)
STUB(cuPointerGetAttribute)
STUB(cuTensorMapEncodeTiled)
