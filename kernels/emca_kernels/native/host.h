// What the operators share: the instruction set that serves, element types, memory of their own.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <new>
#include <vector>

#include "kernels.h"

namespace emca {

enum class Isa { base, avx2, avx512, avx512bf16 };

// The fastest that this CPU can run, or the one that EMCA_ISA names.
Isa isa();

// Its own of what each instruction set has.
#if defined(__x86_64__)
#define EMCA_SERVING(name)                                                \
  (::emca::isa() == ::emca::Isa::avx512bf16 ? ::emca::avx512bf16::name \
   : ::emca::isa() == ::emca::Isa::avx512   ? ::emca::avx512::name     \
   : ::emca::isa() == ::emca::Isa::avx2     ? ::emca::avx2::name       \
                                            : ::emca::base::name)
#else
#define EMCA_SERVING(name) (::emca::isa(), ::emca::base::name)
#endif

inline Type type_of(const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Type::float32;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Half: return Type::float16;
    default: STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
  }
}

// Vectors that start on a cache line: a load that straddles two costs twice.
template <class T>
struct Aligned {
  using value_type = T;
  Aligned() = default;
  template <class U>
  Aligned(const Aligned<U>&) {}
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64})); }
  void deallocate(T* data, size_t) { ::operator delete(data, std::align_val_t{64}); }
  bool operator==(const Aligned&) const { return true; }
};

using Buffer = std::vector<float, Aligned<float>>;

}  // namespace emca
