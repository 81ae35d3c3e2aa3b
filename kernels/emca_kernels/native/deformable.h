// What each instruction set exports for multi-scale deformable attention: the samples of a range of queries, and their gradients.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace emca {

// A feature level: its size, and the number of pixels of the levels before it.
struct Level {
  int32_t rows, columns, first;
};

// One image. Values [P, M, d] with channels next to each other and strides in elements; the offset of every pixel is below 2^31.
// Everything else is float32 and contiguous.
struct Sampling {
  const void* values;
  Type type;
  int64_t pixel_stride, head_stride;
  const Level* levels;
  int level_count, heads, points, channels;
  const float* places;     // [Q, M, L, N, 2] locations in 0..1; with reference points: distances from them, in pixels
  const float* weights;    // [Q, M, L, N]; with reference points: logits
  const float* reference;  // [Q, L or 1, 2] in 0..1, or null
  int64_t reference_stride;  // 2 where each level has its own, else 0
  int64_t reference_query;   // from one query to the next

  int samples() const { return level_count * points; }
};

// What samples are gathered with: [lanes] each.
struct SampleRoom {
  int32_t *rows, *columns, *first, *offsets[4];
  float *x, *y, *weights, *shares[4], *fraction_x, *fraction_y, *inside[4];

  static constexpr int INTS = 7, FLOATS = 13;
  SampleRoom(int32_t* ints, float* floats, int64_t lanes)
      : rows(ints), columns(ints + lanes), first(ints + 2 * lanes), x(floats), y(floats + lanes), weights(floats + 2 * lanes),
        fraction_x(floats + 3 * lanes), fraction_y(floats + 4 * lanes) {
    for (int corner = 0; corner < 4; ++corner) {
      offsets[corner] = ints + (3 + corner) * lanes;
      shares[corner] = floats + (5 + corner) * lanes;
      inside[corner] = floats + (9 + corner) * lanes;
    }
  }
};

// Of one image: of the result [Q, M, d], and into values [P, M, d], locations [Q, M, L, N, 2] and weights [Q, M, L, N].
struct SampleGradients {
  const float* of_result;
  float *of_values, *of_locations, *of_weights;
};

struct DeformableKernels {
  // result [Q, M, d] of queries [begin, end); room for M * L * N lanes
  void (*attend)(const Sampling& sampling, int64_t begin, int64_t end, const SampleRoom& room, float* result);
  // adds to the gradient of one head's values at one level, which is zero, and writes those of its locations and weights; room for
  // SAMPLE_BLOCK * N lanes
  void (*attend_backward)(const Sampling& sampling, int64_t queries, int head, int level, const SampleRoom& room,
                          const SampleGradients& gradients);
};

constexpr int SAMPLE_BLOCK = 16;  // queries whose samples are laid out at a time, backward

namespace base { extern const DeformableKernels deformable_kernels; }
#if defined(__x86_64__)
namespace avx2 { extern const DeformableKernels deformable_kernels; }
namespace avx512 { extern const DeformableKernels deformable_kernels; }
namespace avx512bf16 { extern const DeformableKernels deformable_kernels; }
#endif

}  // namespace emca
