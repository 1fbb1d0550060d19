#include <cuda.h>
#include <cuda_runtime_api.h>
#include <cstring>
#include <cstdlib>
#include <cstdio>
#include <atomic>
#include <map>
#include <mutex>
#define OK return cudaSuccess
#undef cudaGetDeviceProperties
static thread_local int current = 0;
static std::atomic<unsigned long> handle{0x1000};
static const int count = 32;  // of the largest node
static std::map<char*, size_t> pinned;
static std::mutex mutex;
extern "C" {
cudaError_t cudaGetDeviceCount(int* n) { *n = count; OK; }
cudaError_t cudaGetDevice(int* d) { *d = current; OK; }
cudaError_t cudaSetDevice(int d) { current = d; OK; }
cudaError_t cudaDriverGetVersion(int* v) { *v = 13000; OK; }
cudaError_t cudaRuntimeGetVersion(int* v) { *v = 13000; OK; }
cudaError_t cudaGetLastError() { OK; }
cudaError_t cudaPeekAtLastError() { OK; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  memset(p, 0, sizeof *p); strcpy(p->name, "fake H100"); p->major = 9; p->minor = 0; p->totalGlobalMem = 80ul << 30;
  p->multiProcessorCount = 132; p->warpSize = 32; p->maxThreadsPerMultiProcessor = 2048; p->sharedMemPerBlockOptin = 232448;
  p->maxThreadsPerBlock = 1024; p->sharedMemPerBlock = 49152; p->regsPerMultiprocessor = 65536; OK; }
cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr, int) { *v = 0; OK; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { *can = 1; OK; }
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { OK; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { *least = 0; *greatest = -5; OK; }
cudaError_t cudaMemGetInfo(size_t* f, size_t* t) { *f = 70ul << 30; *t = 80ul << 30; OK; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) { *s = (cudaStream_t)handle.fetch_add(16); OK; }
cudaError_t cudaStreamCreate(cudaStream_t* s) { *s = (cudaStream_t)handle.fetch_add(16); OK; }
cudaError_t cudaStreamDestroy(cudaStream_t) { OK; }
cudaError_t cudaStreamQuery(cudaStream_t) { OK; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { OK; }
cudaError_t cudaStreamGetPriority(cudaStream_t, int* p) { *p = 0; OK; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { OK; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* s) { *s = cudaStreamCaptureStatusNone; OK; }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* s, unsigned long long*, cudaGraph_t*, const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) { *s = cudaStreamCaptureStatusNone; OK; }
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { OK; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { *e = (cudaEvent_t)handle.fetch_add(16); OK; }
cudaError_t cudaEventDestroy(cudaEvent_t) { OK; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { OK; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t, cudaStream_t, unsigned) { OK; }
cudaError_t cudaEventQuery(cudaEvent_t) { OK; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { OK; }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) { *ms = 0; OK; }
cudaError_t cudaDeviceSynchronize() { OK; }

cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) { *p = malloc(n); std::lock_guard<std::mutex> l(mutex); pinned[(char*)*p] = n; OK; }
cudaError_t cudaFreeHost(void* p) { std::lock_guard<std::mutex> l(mutex); pinned.erase((char*)p); free(p); OK; }
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  memset(a, 0, sizeof *a); std::lock_guard<std::mutex> l(mutex); auto it = pinned.upper_bound((char*)p);
  bool in = it != pinned.begin() && (--it, (char*)p < it->first + (it->second ? it->second : 1));
  a->type = in ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered; OK; }
static cudaError_t escaped(const char* f) { fprintf(stderr, "fake CUDA: %s called: a tensor escaped\n", f); return cudaErrorNotSupported; }
cudaError_t cudaMalloc(void**, size_t n) { return escaped("cudaMalloc"); }
cudaError_t cudaMemcpyAsync(void*, const void*, size_t, cudaMemcpyKind, cudaStream_t) { return escaped("cudaMemcpyAsync"); }
cudaError_t cudaMemcpy(void*, const void*, size_t, cudaMemcpyKind) { return escaped("cudaMemcpy"); }
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return escaped("cudaMemsetAsync"); }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return escaped("cudaLaunchKernel"); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) { return escaped("cudaLaunchKernelExC"); }
cudaError_t cudaEventCreate(cudaEvent_t* e) { *e = (cudaEvent_t)handle.fetch_add(16); OK; }
cudaError_t cudaFree(void*) { OK; }
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* p, int) { *p = nullptr; OK; }
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { OK; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) { *s = (cudaStream_t)handle.fetch_add(16); OK; }
// driver
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) { *flags = 0; *active = 1; return CUDA_SUCCESS; }
CUresult any() { return CUDA_ERROR_NOT_SUPPORTED; }
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** f, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* r) {
  *f = strcmp(name, "cuDevicePrimaryCtxGetState") ? (void*)any : (void*)cuDevicePrimaryCtxGetState; if (r) *r = cudaDriverEntryPointSuccess; OK; }
}
