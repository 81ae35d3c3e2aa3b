// Compiled once per instruction set. Samples lie side by side in lanes while corners and shares are computed, then channels do.
#include "deformable.h"

#include "vectors.h"

namespace emca::ISA {
namespace {

constexpr int MOST_VECTORS = W == 16 ? 2 : 4;  // of channels that are summed at a time

// A coordinate between two pixels: where both are, moved to the border if they are outside, and whether they are inside.
struct Between {
  int32_t low, high;
  float fraction, low_inside, high_inside;
};

inline Between between(float coordinate, int32_t size) {
  const float floor = __builtin_floorf(coordinate);
  // NaN becomes -2; it stays in the fraction, and so in the result
  const float above = floor > -2.f ? floor : -2.f;
  const int32_t low = int32_t(above < float(size) ? above : float(size)), high = low + 1;
  const auto inside = [size](int32_t at) { return (at >= 0) & (at < size) ? 1.f : 0.f; };
  const auto moved = [size](int32_t at) { return at < 0 ? 0 : at < size ? at : size - 1; };
  return {moved(low), moved(high), coordinate - floor, inside(low), inside(high)};
}

// Offsets and bilinear shares of the four corners around (x, y), in pixels; shares outside of the level are zero.
template <bool differentiable>
void find_corners(const SampleRoom& room, int count, int32_t stride) {
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) {
    const Between across = between(room.x[i], room.columns[i]), down = between(room.y[i], room.rows[i]);
    const int32_t top = room.first[i] + down.low * room.columns[i], bottom = room.first[i] + down.high * room.columns[i];
    room.offsets[0][i] = (top + across.low) * stride;
    room.offsets[1][i] = (top + across.high) * stride;
    room.offsets[2][i] = (bottom + across.low) * stride;
    room.offsets[3][i] = (bottom + across.high) * stride;
    const float left = (1 - across.fraction) * across.low_inside, right = across.fraction * across.high_inside;
    const float upper = (1 - down.fraction) * down.low_inside, lower = down.fraction * down.high_inside;
    const float weight = differentiable ? 1.f : room.weights[i];
    room.shares[0][i] = upper * left * weight;
    room.shares[1][i] = upper * right * weight;
    room.shares[2][i] = lower * left * weight;
    room.shares[3][i] = lower * right * weight;
    if (differentiable) {
      room.fraction_x[i] = across.fraction;
      room.fraction_y[i] = down.fraction;
      room.inside[0][i] = down.low_inside * across.low_inside;
      room.inside[1][i] = down.low_inside * across.high_inside;
      room.inside[2][i] = down.high_inside * across.low_inside;
      room.inside[3][i] = down.high_inside * across.high_inside;
    }
  }
}

void set_level(const Level& level, const SampleRoom& room, int begin, int end) {
  for (int i = begin; i < end; ++i) {
    room.rows[i] = level.rows;
    room.columns[i] = level.columns;
    room.first[i] = level.first;
  }
}

// Softmax of each head's logits.
void weigh(const float* logits, int heads, int samples, float* weights) {
  for (int head = 0; head < heads; ++head) {
    float most = -INFINITE;
    // a NaN is not larger, and comes through the exponential
    for (int i = head * samples; i < (head + 1) * samples; ++i) most = logits[i] > most ? logits[i] : most;
    for (int i = head * samples; i < (head + 1) * samples; ++i) weights[i] = logits[i] - most;
  }
  const int count = heads * samples;
  int i = 0;
  for (; i + W <= count; i += W) store(weights + i, exponential(load(weights + i)));
  if (i < count) {
    float rest[W] = {};
    std::memcpy(rest, weights + i, (count - i) * sizeof(float));
    store(rest, exponential(load(rest)));
    std::memcpy(weights + i, rest, (count - i) * sizeof(float));
  }
  for (int head = 0; head < heads; ++head) {
    float total = 0;
    for (int i = head * samples; i < (head + 1) * samples; ++i) total += weights[i];
    for (int i = head * samples; i < (head + 1) * samples; ++i) weights[i] /= total;
  }
}

// Coordinates in pixels and weights of all samples of a query.
void place(const Sampling& sampling, int64_t query, const SampleRoom& room) {
  const int count = sampling.heads * sampling.samples();
  const float *places = sampling.places + query * count * 2, *weights = sampling.weights + query * count;
  if (!sampling.reference) {
    for (int i = 0; i < count; ++i) {
      room.x[i] = places[2 * i] * float(room.columns[i]) - 0.5f;
      room.y[i] = places[2 * i + 1] * float(room.rows[i]) - 0.5f;
      room.weights[i] = weights[i];
    }
    return;
  }
  for (int head = 0, i = 0; head < sampling.heads; ++head)
    for (int level = 0; level < sampling.level_count; ++level) {
      const float* reference = sampling.reference + query * sampling.reference_query + level * sampling.reference_stride;
      const float x = reference[0] * float(sampling.levels[level].columns) - 0.5f;
      const float y = reference[1] * float(sampling.levels[level].rows) - 0.5f;
      for (const int end = i + sampling.points; i < end; ++i) {
        room.x[i] = x + places[2 * i];
        room.y[i] = y + places[2 * i + 1];
      }
    }
  weigh(weights, sampling.heads, sampling.samples(), room.weights);
}

// V vectors of channels of the weighted sum over `count` samples. Several sums run beside each other to hide the latency of additions.
template <int V, class T>
inline void gather(const T* values, const SampleRoom& room, int first, int count, float* result) {
  constexpr int SUMS = V > 2 ? 2 : 4;
  Floats sums[SUMS][V] = {};
  for (int i = first; i < first + count; ++i)
#pragma GCC unroll 4
    for (int corner = 0; corner < 4; ++corner) {
      const T* from = values + room.offsets[corner][i];
      const Floats share = all(room.shares[corner][i]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[corner % SUMS][v] += share * load(from + v * W);
    }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    Floats total = sums[0][v] + sums[1][v];
    if (SUMS == 4) total += sums[2 % SUMS][v] + sums[3 % SUMS][v];
    store(result + v * W, total);
  }
}

template <class T>
void attend_as(const Sampling& sampling, int64_t begin, int64_t end, const SampleRoom& room, float* result) {
  const int samples = sampling.samples(), count = sampling.heads * samples, channels = sampling.channels;
  for (int i = 0; i < count; ++i) {
    const Level& level = sampling.levels[i % samples / sampling.points];
    set_level(level, room, i, i + 1);
  }
  for (int64_t query = begin; query < end; ++query) {
    place(sampling, query, room);
    find_corners<false>(room, count, int32_t(sampling.pixel_stride));
    for (int head = 0; head < sampling.heads; ++head) {
      const T* values = static_cast<const T*>(sampling.values) + head * sampling.head_stride;
      float* to = result + (query * sampling.heads + head) * channels;
      int c = 0;
      for (; c + MOST_VECTORS * W <= channels; c += MOST_VECTORS * W)
        gather<MOST_VECTORS>(values + c, room, head * samples, samples, to + c);
      for (; c + W <= channels; c += W) gather<1>(values + c, room, head * samples, samples, to + c);
      for (; c < channels; ++c) {
        float total = 0;
        for (int i = head * samples; i < (head + 1) * samples; ++i)
          for (int corner = 0; corner < 4; ++corner) total += room.shares[corner][i] * widen(values + c + room.offsets[corner][i]);
        to[c] = total;
      }
    }
  }
}

void attend(const Sampling& sampling, int64_t begin, int64_t end, const SampleRoom& room, float* result) {
  switch (sampling.type) {
    case Type::float32: return attend_as<float>(sampling, begin, end, room, result);
    case Type::bfloat16: return attend_as<Bfloat16>(sampling, begin, end, room, result);
    case Type::float16: return attend_as<Float16>(sampling, begin, end, room, result);
  }
}

// Dot product of a corner's channels with the gradient of the result, which is also added to the gradient of that corner's values.
template <class T>
inline float spread(const T* value, const float* of_result, float share, float* of_value, int channels) {
  Floats products = {};
  int c = 0;
  for (; c + W <= channels; c += W) {
    const Floats gradient = load(of_result + c);
    products += gradient * load(value + c);
    store(of_value + c, load(of_value + c) + all(share) * gradient);
  }
  float product = sum(products);
  for (; c < channels; ++c) {
    product += of_result[c] * widen(value + c);
    of_value[c] += share * of_result[c];
  }
  return product;
}

template <class T>
void attend_backward_as(const Sampling& sampling, int64_t queries, int head, int level, const SampleRoom& room,
                        const SampleGradients& gradients) {
  const int points = sampling.points, channels = sampling.channels;
  const int32_t stride = sampling.heads * channels;
  const Level& size = sampling.levels[level];
  set_level(size, room, 0, SAMPLE_BLOCK * points);
  const T* values = static_cast<const T*>(sampling.values) + head * sampling.head_stride;
  float* of_values = gradients.of_values + head * channels;
  // the samples of a query start here
  const auto start = [&](int64_t query) { return ((query * sampling.heads + head) * sampling.level_count + level) * points; };
  for (int64_t first = 0; first < queries; first += SAMPLE_BLOCK) {
    const int block = int(queries - first < SAMPLE_BLOCK ? queries - first : SAMPLE_BLOCK);
    for (int i = 0; i < block * points; ++i) {
      const int64_t sample = start(first + i / points) + i % points;
      room.x[i] = sampling.places[2 * sample] * float(size.columns) - 0.5f;
      room.y[i] = sampling.places[2 * sample + 1] * float(size.rows) - 0.5f;
      room.weights[i] = sampling.weights[sample];
    }
    find_corners<true>(room, block * points, 1);
    for (int i = 0; i < block * points; ++i) {
      const int64_t query = first + i / points, sample = start(query) + i % points;
      const float* of_result = gradients.of_result + (query * sampling.heads + head) * channels;
      float products[4];
      for (int corner = 0; corner < 4; ++corner) {
        const int64_t pixel = room.offsets[corner][i];
        const float product = spread(values + pixel * sampling.pixel_stride, of_result, room.weights[i] * room.shares[corner][i],
                                     of_values + pixel * stride, channels);
        products[corner] = room.inside[corner][i] * product;
      }
      const float right = room.fraction_x[i], lower = room.fraction_y[i], left = 1 - right, upper = 1 - lower;
      const float above = left * products[0] + right * products[1], below = left * products[2] + right * products[3];
      gradients.of_weights[sample] = upper * above + lower * below;
      const float across = upper * (products[1] - products[0]) + lower * (products[3] - products[2]);
      const float down = left * (products[2] - products[0]) + right * (products[3] - products[1]);
      gradients.of_locations[2 * sample] = room.weights[i] * float(size.columns) * across;
      gradients.of_locations[2 * sample + 1] = room.weights[i] * float(size.rows) * down;
    }
  }
}

void attend_backward(const Sampling& sampling, int64_t queries, int head, int level, const SampleRoom& room,
                     const SampleGradients& gradients) {
  switch (sampling.type) {
    case Type::float32: return attend_backward_as<float>(sampling, queries, head, level, room, gradients);
    case Type::bfloat16: return attend_backward_as<Bfloat16>(sampling, queries, head, level, room, gradients);
    case Type::float16: return attend_backward_as<Float16>(sampling, queries, head, level, room, gradients);
  }
}

}  // namespace

extern const DeformableKernels deformable_kernels;
const DeformableKernels deformable_kernels{attend, attend_backward};

}  // namespace emca::ISA
