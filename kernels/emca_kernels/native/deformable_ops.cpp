// Multi-scale deformable attention: what is split over threads, and the boundary to torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "deformable.h"
#include "host.h"

namespace {

using emca::Buffer, emca::DeformableKernels, emca::Level, emca::SampleGradients, emca::SampleRoom, emca::Sampling;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t GRAIN = 32;  // queries that are worth a thread

const DeformableKernels& kernels() { return EMCA_SERVING(deformable_kernels); }

const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

// Sizes, and tensors by image. `sizes` holds rows and columns of each level.
struct Call {
  const Tensor &value, &places, &weights;
  const std::optional<Tensor>& reference;
  std::vector<Level> levels;
  int64_t images, queries, heads, points, channels;

  Call(const Tensor& value_, const std::vector<int64_t>& sizes, const Tensor& places_, const Tensor& weights_,
       const std::optional<Tensor>& reference_)
      : value(value_), places(places_), weights(weights_), reference(reference_), images(value.size(0)), queries(places.size(1)),
        heads(value.size(2)), points(places.size(4)), channels(value.size(3)) {
    int64_t first = 0;
    for (size_t at = 0; at + 1 < sizes.size(); at += 2) {
      levels.push_back({int32_t(sizes[at]), int32_t(sizes[at + 1]), int32_t(first)});
      first += sizes[at] * sizes[at + 1];
    }
    STD_TORCH_CHECK(first == value.size(1), "expected ", first, " pixels, found ", value.size(1));
    STD_TORCH_CHECK(value.size(1) * value.stride(1) < (int64_t(1) << 31), "expected offsets of pixels below 2^31");
  }

  int64_t samples() const { return heads * int64_t(levels.size()) * points; }

  Sampling of(int64_t image) const {
    const auto* values = static_cast<const char*>(value.const_data_ptr()) + image * value.stride(0) * int64_t(value.element_size());
    const float* own = reference ? floats(*reference) + image * reference->stride(0) : nullptr;
    return {values, emca::type_of(value), value.stride(1), value.stride(2), levels.data(), int(levels.size()), int(heads), int(points),
            int(channels), floats(places) + image * queries * samples() * 2, floats(weights) + image * queries * samples(), own,
            reference ? reference->stride(2) : 0, reference ? reference->stride(1) : 0};
  }
};

// Memory of a thread behind a SampleRoom.
struct Room {
  int64_t lanes;
  std::vector<int32_t, emca::Aligned<int32_t>> ints;
  Buffer floats;

  // whole cache lines each
  explicit Room(int64_t wanted) : lanes((wanted + 15) / 16 * 16), ints(SampleRoom::INTS * lanes), floats(SampleRoom::FLOATS * lanes) {}
  SampleRoom room() { return {ints.data(), floats.data(), lanes}; }
};

// float32 [B, Q, M, d]. With `reference` [B, Q, L, 2]: `places` are distances from it in pixels, and `weights` are logits.
Tensor deformable_attention(Tensor value, std::vector<int64_t> sizes, Tensor places, Tensor weights, std::optional<Tensor> reference) {
  const Call call(value, sizes, places, weights, reference);
  Tensor result = torch::stable::new_empty(value, {call.images, call.queries, call.heads, call.channels}, ScalarType::Float);
  auto* out = static_cast<float*>(result.mutable_data_ptr());
  torch::stable::parallel_for(0, call.images * call.queries, GRAIN, [&](int64_t begin, int64_t end) {
    Room room(call.samples());
    for (int64_t at = begin; at < end;) {
      const int64_t image = at / call.queries, first = at % call.queries, last = std::min(call.queries, first + end - at);
      kernels().attend(call.of(image), first, last, room.room(), out + image * call.queries * call.heads * call.channels);
      at += last - first;
    }
  });
  return result;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// float32 gradients of value [B, P, M, d], locations and weights, from that of the result, float32 [B, Q, M, d]. A level of a head of an
// image is one thread's, from its first query to its last: threads do not change a bit.
Gradients deformable_attention_backward(Tensor gradient, Tensor value, std::vector<int64_t> sizes, Tensor locations, Tensor weights) {
  const std::optional<Tensor> none;
  const Call call(value, sizes, locations, weights, none);
  const int64_t pixels = value.size(1), levels = int64_t(call.levels.size()), width = call.heads * call.channels;
  Tensor of_value = torch::stable::new_empty(gradient, {call.images, pixels, call.heads, call.channels});
  Tensor of_locations = torch::stable::new_empty(gradient, {call.images, call.queries, call.heads, levels, call.points, 2});
  Tensor of_weights = torch::stable::new_empty(gradient, {call.images, call.queries, call.heads, levels, call.points});
  auto* values = static_cast<float*>(of_value.mutable_data_ptr());
  torch::stable::parallel_for(0, call.images * pixels * width, 1 << 15,
                              [&](int64_t begin, int64_t end) { std::fill(values + begin, values + end, 0.f); });
  torch::stable::parallel_for(0, call.images * call.heads * levels, 1, [&](int64_t begin, int64_t end) {
    Room room(emca::SAMPLE_BLOCK * call.points);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t image = at / levels / call.heads, queries = image * call.queries;
      const SampleGradients gradients{floats(gradient) + queries * width, values + image * pixels * width,
                                      static_cast<float*>(of_locations.mutable_data_ptr()) + queries * call.samples() * 2,
                                      static_cast<float*>(of_weights.mutable_data_ptr()) + queries * call.samples()};
      kernels().attend_backward(call.of(image), call.queries, int(at / levels % call.heads), int(at % levels), room.room(), gradients);
    }
  });
  return {of_value, of_locations, of_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(emca_native, library) {
  library.def("deformable_attention(Tensor value, int[] sizes, Tensor places, Tensor weights, Tensor? reference) -> Tensor");
  library.def(
      "deformable_attention_backward(Tensor gradient, Tensor value, int[] sizes, Tensor locations, Tensor weights)"
      " -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(emca_native, CPU, library) {
  library.impl("deformable_attention", TORCH_BOX(&deformable_attention));
  library.impl("deformable_attention_backward", TORCH_BOX(&deformable_attention_backward));
}
