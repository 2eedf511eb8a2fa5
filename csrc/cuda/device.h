// All that kernels take from the device: indices, barriers, shared memory, matrix instructions, asynchronous
// copies, conversions. nvcc makes them instructions; with DSP_EMULATE they are functions of the host
// emulation (tests/native/emulation), with the fragment layouts that the PTX manual documents.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(DSP_EMULATE)
#include "emulation.h"
#define DSP_DEVICE inline
#define DSP_KERNEL(threads, blocks) void
#define DSP_UNROLL
#define DSP_UNROLL_1
#define DSP_UNROLL_2
#else
#define DSP_DEVICE __device__ __forceinline__
#define DSP_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define DSP_UNROLL _Pragma("unroll")
#define DSP_UNROLL_1 _Pragma("unroll 1")
#define DSP_UNROLL_2 _Pragma("unroll 2")
#endif

namespace dsp {
namespace device {

#if defined(DSP_EMULATE)

DSP_DEVICE int thread() { return emulation::thread(); }
DSP_DEVICE int64_t block_x() { return emulation::block_x(); }
DSP_DEVICE int block_y() { return emulation::block_y(); }
DSP_DEVICE int64_t blocks_x() { return emulation::blocks_x(); }
DSP_DEVICE int blocks_y() { return emulation::blocks_y(); }
DSP_DEVICE void barrier() { emulation::barrier(); }
DSP_DEVICE void sync_warp() { emulation::sync_warp(); }

template <typename T>
DSP_DEVICE T load_shared(uint32_t offset) {
  T value;
  emulation::load_shared(&value, offset, sizeof(T));
  return value;
}
template <typename T>
DSP_DEVICE void store_shared(uint32_t offset, T value) {
  emulation::store_shared(offset, &value, sizeof(T));
}
template <typename T>
DSP_DEVICE T load_global(const T* address) {
  emulation::read_global(address, sizeof(T));
  return *address;
}
template <typename T>
DSP_DEVICE T load_written(const T* address) {
  emulation::read_global(address, sizeof(T));
  return *address;
}
template <typename T>
DSP_DEVICE void store_global(T* address, const T& value) {
  emulation::write_global(address, sizeof(T));
  *address = value;
}

template <int N, bool kTransposed>
DSP_DEVICE void load_matrix(uint32_t (&to)[N], uint32_t offset) {
  emulation::load_matrix(to, N, kTransposed, offset);
}
DSP_DEVICE void multiply_f16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::multiply(emulation::kF16, sum, a, b);
}
DSP_DEVICE void multiply_bf16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::multiply(emulation::kBf16, sum, a, b);
}
DSP_DEVICE void multiply_tf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::multiply(emulation::kTf32, sum, a, b);
}

DSP_DEVICE void copy_async16(uint32_t offset, const void* from, bool valid) {
  emulation::copy_async(offset, from, 16, valid ? 16 : 0);
}
DSP_DEVICE void commit_copies() { emulation::commit_copies(); }
template <int kPending>
DSP_DEVICE void wait_copies() {
  emulation::wait_copies(kPending);
}

template <typename T>
DSP_DEVICE T shuffle_xor(T value, int lanes) {
  static_assert(sizeof(T) % 4 == 0, "32 bits or more");
  uint32_t bits[sizeof(T) / 4];
  std::memcpy(bits, &value, sizeof(T));
  for (uint32_t& word : bits) word = emulation::shuffle_xor(word, lanes);
  std::memcpy(&value, bits, sizeof(T));
  return value;
}

DSP_DEVICE float from_f16(uint16_t bits) { return emulation::from_f16(bits); }
DSP_DEVICE uint16_t to_f16(float value) { return emulation::to_f16(value); }
DSP_DEVICE uint16_t to_bf16(float value) { return emulation::to_bf16(value); }

#else

extern __shared__ __align__(128) unsigned char shared_bytes[];

DSP_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
DSP_DEVICE int64_t block_x() { return static_cast<int64_t>(blockIdx.x); }
DSP_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
DSP_DEVICE int64_t blocks_x() { return static_cast<int64_t>(gridDim.x); }
DSP_DEVICE int blocks_y() { return static_cast<int>(gridDim.y); }
DSP_DEVICE void barrier() { __syncthreads(); }
// Brings the lanes of a warp together, and their memory: before a warp-wide instruction that follows code in
// which they went apart, and between the stores and the loads of shared memory that a warp keeps to itself.
DSP_DEVICE void sync_warp() { __syncwarp(); }

template <typename T>
DSP_DEVICE T load_shared(uint32_t offset) {
  return *reinterpret_cast<const T*>(shared_bytes + offset);
}
template <typename T>
DSP_DEVICE void store_shared(uint32_t offset, T value) {
  *reinterpret_cast<T*>(shared_bytes + offset) = value;
}
// By way of the read-only cache where T is a number: what nobody writes in the same launch.
template <typename T>
DSP_DEVICE T load_global(const T* address) {
  return __ldg(address);
}
// What the same launch may write.
template <typename T>
DSP_DEVICE T load_written(const T* address) {
  return *address;
}
template <typename T>
DSP_DEVICE void store_global(T* address, const T& value) {
  *address = value;
}

DSP_DEVICE uint32_t shared_address(uint32_t offset) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_bytes)) + offset;
}

// Eight rows of 16 bytes make a matrix; lanes 8i to 8i+7 give the rows of matrix i. Lane l gets 32 bits of
// each: row l / 4, bytes 4 (l % 4) on; transposed (16-bit elements): column l / 4, rows 2 (l % 4) and the
// next.
template <int N, bool kTransposed>
DSP_DEVICE void load_matrix(uint32_t (&to)[N], uint32_t offset) {
  static_assert(N == 2 || N == 4, "two or four matrices");
  const uint32_t from = shared_address(offset);
  if constexpr (N == 4 && kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  } else if constexpr (N == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  } else if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(from)
                 : "memory");
  }
}

// 16 x 8 sums in float32. With r = lane / 4 and q = lane % 4: sum[0..1] is row r, columns 2q and 2q + 1;
// sum[2..3] the same of row r + 8. a (16 x 16) holds rows r, r + 8, r, r + 8 at columns 2q.. of the left,
// left, right, right half; b (16 x 8) column r at rows 2q.. of the upper and lower half.
DSP_DEVICE void multiply_f16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DSP_DEVICE void multiply_bf16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same with 8 columns of a, one 32-bit element in the place of two 16-bit ones. The low 13 bits of the
// operands are ignored.
DSP_DEVICE void multiply_tf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 16 bytes into shared memory, zeros where not valid; there only after wait_copies.
DSP_DEVICE void copy_async16(uint32_t offset, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(offset)),
               "l"(__cvta_generic_to_global(from)), "r"(valid ? 16 : 0)
               : "memory");
}
DSP_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kPending of this thread's committed groups are under way.
template <int kPending>
DSP_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

template <typename T>
DSP_DEVICE T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}

DSP_DEVICE float from_f16(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
DSP_DEVICE uint16_t to_f16(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
DSP_DEVICE uint16_t to_bf16(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

#endif

DSP_DEVICE int lane() { return thread() & 31; }
DSP_DEVICE int warp() { return thread() >> 5; }

DSP_DEVICE float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
DSP_DEVICE float from_bf16(uint16_t bits) { return as_float(static_cast<uint32_t>(bits) << 16); }

}  // namespace device

// The element types of tensors: how one is stored, and how two fragments are multiplied. Stored is the type
// that stands for all that are stored alike.
struct F16 {
  using Store = uint16_t;
  using Stored = F16;
  static constexpr bool kMatrix = true;
  static DSP_DEVICE float load(Store value) { return device::from_f16(value); }
  static DSP_DEVICE Store store(float value) { return device::to_f16(value); }
  static DSP_DEVICE void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    device::multiply_f16(sum, a, b);
  }
};
struct Bf16 {
  using Store = uint16_t;
  using Stored = Bf16;
  static constexpr bool kMatrix = true;
  static DSP_DEVICE float load(Store value) { return device::from_bf16(value); }
  static DSP_DEVICE Store store(float value) { return device::to_bf16(value); }
  static DSP_DEVICE void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    device::multiply_bf16(sum, a, b);
  }
};
struct F32;
struct Tf32 {
  using Store = float;
  using Stored = F32;
  static constexpr bool kMatrix = true;
  static DSP_DEVICE float load(Store value) { return value; }
  static DSP_DEVICE Store store(float value) { return value; }
  static DSP_DEVICE void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    device::multiply_tf32(sum, a, b);
  }
};
struct F32 {
  using Store = float;
  using Stored = F32;
  static constexpr bool kMatrix = false;  // multiply-adds, not matrix instructions
  static DSP_DEVICE float load(Store value) { return value; }
  static DSP_DEVICE Store store(float value) { return value; }
};

}  // namespace dsp
