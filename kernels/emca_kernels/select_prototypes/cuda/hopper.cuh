// What the kernels ask of the machine: barriers, tensor copies, matrix products, and little else. PTX ISA 8.0, compute capability 9.0a.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "layout.h"

namespace emca::cuda {

using TensorMap = CUtensorMap;

// The block's shared memory, from the first aligned address on.
__device__ inline uint32_t shared_base() {
  extern __shared__ uint8_t memory[];
  return (uint32_t(__cvta_generic_to_shared(memory)) + SHARED_ALIGNMENT - 1) / SHARED_ALIGNMENT * SHARED_ALIGNMENT;
}

__device__ inline void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Tensor copies are made through another proxy: it must see the barriers that threads have initialised.
__device__ inline void barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and lets the phase last until the copies have brought as many bytes.
__device__ inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Until the phase of this parity is over; the one before the first has parity 1.
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t over = 0;
  while (!over)
    asm volatile(
        "{\n.reg .pred over;\nmbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\nselp.u32 %0, 1, 0, over;\n}"
        : "=r"(over)
        : "r"(barrier), "r"(parity)
        : "memory");
}

// A panel of a map's box, swizzled, to shared memory; rows beyond the tensor are zeros, which count as bytes too.
__device__ inline void copy_panel(uint32_t to, const TensorMap& map, int channel, int row, int image, uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
               "l"(&map), "r"(channel), "r"(row), "r"(image), "r"(barrier)
               : "memory");
}

// Keeps the compiler from moving reads or writes of accumulators over what stands here.
template <int COUNT>
__device__ inline void pin(float (&scores)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(scores[i])::"memory");
}

// Before products: registers are as threads left them. What follows is executed by whole warps, whose lanes waits and branches may have parted.
__device__ inline void products_begin() {
  __syncwarp();
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until all products but those of the last commit have read their operands.
__device__ inline void products_wait_but_last() { asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory"); }

// Until all are done; only now do the accumulators hold sums.
template <int COUNT>
__device__ inline void products_wait(float (&scores)[COUNT]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  pin(scores);
}

// Operands of the instruction: accumulators, both descriptors, and whether to add.
#define EMCA_OPERANDS_16 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define EMCA_OPERANDS_32 EMCA_OPERANDS_16 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define EMCA_OPERANDS_64 EMCA_OPERANDS_32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define EMCA_4(i) "+f"(s[i]), "+f"(s[i + 1]), "+f"(s[i + 2]), "+f"(s[i + 3])
#define EMCA_16(i) EMCA_4(i), EMCA_4(i + 4), EMCA_4(i + 8), EMCA_4(i + 12)
#define EMCA_PRODUCT(PIXELS, TYPE, OPERANDS, A, B, ADD, ...)                                                      \
  asm volatile("{\n.reg .pred add;\nsetp.ne.u32 add, %" #ADD ", 0;\n"                                            \
               "wgmma.mma_async.sync.aligned.m64n" #PIXELS "k16.f32." TYPE "." TYPE " {" OPERANDS "}, %" #A ", %" #B \
               ", add, 1, 1, 0, 0;\n}"                                                                           \
               : __VA_ARGS__                                                                                      \
               : "l"(queries), "l"(pixels), "r"(add))
#define EMCA_PRODUCTS(TYPE)                                                                                               \
  if constexpr (TILE == 32)                                                                                               \
    EMCA_PRODUCT(32, TYPE, EMCA_OPERANDS_16, 16, 17, 18, EMCA_16(0));                                                     \
  else if constexpr (TILE == 64)                                                                                          \
    EMCA_PRODUCT(64, TYPE, EMCA_OPERANDS_32, 32, 33, 34, EMCA_16(0), EMCA_16(16));                                        \
  else                                                                                                                    \
    EMCA_PRODUCT(128, TYPE, EMCA_OPERANDS_64, 64, 65, 66, EMCA_16(0), EMCA_16(16), EMCA_16(32), EMCA_16(48))

// scores [64 queries, TILE pixels] of a warpgroup (+)= queries [64, 16 channels] times pixels [TILE, 16 channels] transposed.
template <Number NUMBER, int TILE>
__device__ inline void product(float (&s)[TILE / 2], uint64_t queries, uint64_t pixels, uint32_t add) {
  static_assert(TILE == 32 || TILE == 64 || TILE == 128);
  if constexpr (NUMBER == Number::bfloat16) {
    EMCA_PRODUCTS("bf16");
  } else {
    EMCA_PRODUCTS("f16");
  }
}

#undef EMCA_PRODUCTS
#undef EMCA_PRODUCT
#undef EMCA_16
#undef EMCA_4
#undef EMCA_OPERANDS_64
#undef EMCA_OPERANDS_32
#undef EMCA_OPERANDS_16

// The larger one; NaN if one is.
__device__ inline float max_nan(float one, float other) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(one), "f"(other));
  return larger;
}

template <Number NUMBER>
__device__ inline void store_score(void* scores, int64_t at, float score) {
  if constexpr (NUMBER == Number::bfloat16)
    static_cast<__nv_bfloat16*>(scores)[at] = __float2bfloat16_rn(score);
  else
    static_cast<__half*>(scores)[at] = __float2half_rn(score);
}

// A kernel that was launched to overlap with the one before may start; it waits until the one before has ended and its writes are there.
__device__ inline void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ inline void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace emca::cuda
