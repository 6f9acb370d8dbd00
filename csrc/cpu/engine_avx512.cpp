// The engine on 64-byte vectors. CMake compiles this file alone for AVX-512 (F, DQ, BW and VL: Skylake-X,
// Zen 4 and later), and engine.cpp calls it only on a processor that has them.
#include "engine_impl.h"

namespace rlsedit {

template <class T>
const Engine<T>* avx512_engine() {
#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  static constexpr Engine<T> table = Kernels<T, 64>::table("avx512");
  return &table;
#else
  return nullptr;
#endif
}

template const Engine<float>* avx512_engine<float>();
template const Engine<double>* avx512_engine<double>();

}  // namespace rlsedit
