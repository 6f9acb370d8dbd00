// The engine on 32-byte vectors with fused multiply-add. CMake compiles this file alone with -mavx2 -mfma,
// and engine.cpp calls it only on a processor that has both.
#include "engine_impl.h"

namespace rlsedit {

template <class T>
const Engine<T>* avx2_engine() {
#if defined(__AVX2__) && defined(__FMA__)
  static constexpr Engine<T> table = Kernels<T, 32>::table("avx2");
  return &table;
#else
  return nullptr;
#endif
}

template const Engine<float>* avx2_engine<float>();
template const Engine<double>* avx2_engine<double>();

}  // namespace rlsedit
