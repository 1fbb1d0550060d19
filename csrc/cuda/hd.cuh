// What all kernels share. Every kernel's arithmetic and indexing is a function template over a `Block`: nvcc and NVRTC
// instantiate it with the device's block below, g++ with csrc/kernels/emulate.hpp, which runs the same code on the CPU.
//
// A body does its work in `block.run([&](int x, int y) {...})`, which every thread (x, y) of the block executes once.
// Code outside of `run` must not depend on the thread, and `block.sync()` separates runs that exchange data. NVRTC
// offers no standard headers, so there are none here.
//
// Arguments are structs of 8-byte fields, which a launcher passes by value; offsets are 64-bit.
#pragma once

#ifdef __CUDACC__
#define HECATE_HD __host__ __device__ __forceinline__
#else
#define HECATE_HD inline
#endif

namespace hecate {

using i64 = long long;
using u32 = unsigned int;
using u16 = unsigned short;
using u8 = unsigned char;

constexpr int kVectorBytes = 16;  // widest access of a thread

struct Bf16 {
  u16 bits;
};
struct F16 {
  u16 bits;
};

template <typename To, typename From>
HECATE_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits_as: sizes differ");
  To to;
#ifdef __CUDA_ARCH__
  memcpy(&to, &from, sizeof(To));  // built into NVRTC
#else
  __builtin_memcpy(&to, &from, sizeof(To));
#endif
  return to;
}

// Each operation rounds by itself: a contraction to a fused multiply-add would give the CPU other bits than the GPU. In
// assembly, because CuPy compiles with -ftz=true, which would flush subnormal numbers to zero.
HECATE_HD float mul(float a, float b) {
#ifdef __CUDA_ARCH__
  float out;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
#else
  return a * b;
#endif
}

HECATE_HD float add(float a, float b) {
#ifdef __CUDA_ARCH__
  float out;
  asm("add.rn.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
#else
  return a + b;
#endif
}

HECATE_HD double add(double a, double b) {
#ifdef __CUDA_ARCH__
  double out;
  asm("add.rn.f64 %0, %1, %2;" : "=d"(out) : "d"(a), "d"(b));
  return out;
#else
  return a + b;
#endif
}

HECATE_HD double fused_mul_add(double a, double b, double c) {
#ifdef __CUDA_ARCH__
  double out;
  asm("fma.rn.f64 %0, %1, %2, %3;" : "=d"(out) : "d"(a), "d"(b), "d"(c));
  return out;
#else
  return __builtin_fma(a, b, c);
#endif
}

HECATE_HD float fused_mul_add(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  float out;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(out) : "f"(a), "f"(b), "f"(c));
  return out;
#else
  return __builtin_fmaf(a, b, c);
#endif
}

HECATE_HD double widen(double x) { return x; }
HECATE_HD float widen(float x) { return x; }
HECATE_HD float widen(Bf16 x) { return bits_as<float>(static_cast<u32>(x.bits) << 16); }
HECATE_HD float widen(F16 x) {
#ifdef __CUDA_ARCH__
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
  return out;
#else
  const u32 sign = static_cast<u32>(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_as<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Exact for normal and subnormal numbers: the exponents of the two formats differ by 112.
  const float scaled = bits_as<float>(magnitude << 13) * 0x1p112f;
  return bits_as<float>(sign | bits_as<u32>(scaled));
#endif
}

// To the nearest, ties to even. A NaN stays one; its other bits are those of the machine.
template <typename T>
HECATE_HD T narrow(float x);

template <>
HECATE_HD float narrow<float>(float x) {
  return x;
}

template <>
HECATE_HD Bf16 narrow<Bf16>(float x) {
#ifdef __CUDA_ARCH__
  u16 out;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(x));
  return Bf16{out};
#else
  const u32 bits = bits_as<u32>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return Bf16{0x7fc0};
  return Bf16{static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#endif
}

template <>
HECATE_HD F16 narrow<F16>(float x) {
#ifdef __CUDA_ARCH__
  u16 out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(x));
  return F16{out};
#else
  const u32 bits = bits_as<u32>(x), magnitude = bits & 0x7fffffff;
  const u16 sign = static_cast<u16>(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return F16{static_cast<u16>(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return F16{static_cast<u16>(sign | 0x7c00)};  // rounds to 2^16 or more
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 rounds at 2^-24, the unit of its mantissa
    const float shifted = bits_as<float>(magnitude) + 0.5f;
    return F16{static_cast<u16>(sign | (bits_as<u32>(shifted) - 0x3f000000))};
  }
  const u32 rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return F16{static_cast<u16>(sign | ((rounded >> 13) - (112 << 10)))};
#endif
}

// A cast, or for equal types a copy of the bits.
template <typename Out, typename In>
struct Cast {
  static HECATE_HD Out of(In x) { return narrow<Out>(widen(x)); }
};
template <typename Same>
struct Cast<Same, Same> {
  static HECATE_HD Same of(Same x) { return x; }
};

// What a thread loads or stores in one access.
template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Pack {
  T at[kSize];
};

// Elements per access, such that those of the wider type take 16 bytes.
template <typename A, typename B = A>
struct Lanes {
  static constexpr int value = kVectorBytes / static_cast<int>(sizeof(A) > sizeof(B) ? sizeof(A) : sizeof(B));
};

template <int kSize, typename T>
HECATE_HD Pack<T, kSize> load(const T* from) {
  return *reinterpret_cast<const Pack<T, kSize>*>(from);
}

template <int kSize, typename T>
HECATE_HD void store(T* to, const Pack<T, kSize>& pack) {
  *reinterpret_cast<Pack<T, kSize>*>(to) = pack;
}

// Calls `pack(column)` for groups of `kSize` columns that begin in [0, width), then `one(column)` for the columns left
// over, spread over the threads x of a row. Only `one` is called if the rows are not aligned to 16 bytes.
template <int kSize, int kUnroll = 4, typename WithPack, typename WithOne>
HECATE_HD void each_column(i64 width, bool aligned, int x, int threads, WithPack pack, WithOne one) {
  const i64 packed = aligned ? width / kSize * kSize : 0;
#pragma unroll kUnroll  // so that several loads are on their way
  for (i64 column = static_cast<i64>(x) * kSize; column < packed; column += static_cast<i64>(threads) * kSize)
    pack(column);
  for (i64 column = packed + x; column < width; column += threads) one(column);
}

// Returns the value before.
HECATE_HD u32 atomic_add(u32* at, u32 value) {
#ifdef __CUDA_ARCH__
  return atomicAdd(at, value);
#else
  const u32 before = *at;
  *at += value;
  return before;
#endif
}

HECATE_HD i64 atomic_add(i64* at, i64 value) {
#ifdef __CUDA_ARCH__
  using Word = unsigned long long;
  return static_cast<i64>(atomicAdd(reinterpret_cast<Word*>(at), static_cast<Word>(value)));
#else
  const i64 before = *at;
  *at += value;
  return before;
#endif
}

HECATE_HD void atomic_min(i64* at, i64 value) {
#ifdef __CUDA_ARCH__
  atomicMin(at, value);
#else
  if (value < *at) *at = value;
#endif
}

// Sets a word that other devices read, after everything that this thread has seen happen.
HECATE_HD void store_release(i64* at, i64 value) {
#ifdef __CUDA_ARCH__
  asm volatile("fence.acq_rel.sys;\n\tst.release.sys.global.s64 [%0], %1;" ::"l"(at), "l"(value) : "memory");
#else
  __atomic_store_n(at, value, __ATOMIC_RELEASE);
#endif
}

// Reads a word that another device sets.
HECATE_HD i64 load_acquire(const i64* at) {
#ifdef __CUDA_ARCH__
  i64 value;
  asm volatile("ld.acquire.sys.global.s64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
  return value;
#else
  return __atomic_load_n(at, __ATOMIC_ACQUIRE);
#endif
}

template <typename T>
HECATE_HD T smaller(T a, T b) {
  return a < b ? a : b;
}

template <typename T>
HECATE_HD T larger(T a, T b) {
  return a < b ? b : a;
}

#ifdef __CUDACC__
extern __shared__ __align__(16) u8 shared_memory[];

// One block of threads on the device.
struct DeviceBlock {
  __device__ i64 index() const { return blockIdx.x; }
  __device__ i64 count() const { return gridDim.x; }
  __device__ int width() const { return blockDim.x; }
  __device__ int height() const { return blockDim.y; }
  __device__ int threads() const { return blockDim.x * blockDim.y; }
  __device__ u8* shared() const { return shared_memory; }
  __device__ void sync() const { __syncthreads(); }
  __device__ void fence() const { __threadfence(); }
  __device__ void pause() const { __nanosleep(100); }
  __device__ void fail() const {
    __threadfence_system();
    asm volatile("trap;");
  }
  __device__ i64 nanoseconds() const {
    i64 now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
  }
  template <typename Body>
  __device__ void run(Body body) const {
    body(static_cast<int>(threadIdx.x), static_cast<int>(threadIdx.y));
  }
};

// Bounds: threads of a block, and blocks of which a processor must be able to hold that many.
#define HECATE_BOUNDED_KERNEL(bounds, name, ...)                                  \
  extern "C" __global__ void __launch_bounds__ bounds name(const __VA_ARGS__::Args args) { \
    hecate::DeviceBlock block;                                                    \
    __VA_ARGS__::run(args, block);                                                \
  }
#define HECATE_KERNEL(name, ...) HECATE_BOUNDED_KERNEL((256, 4), name, __VA_ARGS__)
#define HECATE_SINGLE_BLOCK_KERNEL(name, ...) HECATE_BOUNDED_KERNEL((256, 1), name, __VA_ARGS__)
#endif

}  // namespace hecate
