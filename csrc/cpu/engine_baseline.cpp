// The engine on 16-byte vectors, which every x86-64 and every AArch64 processor has.
#include "engine_impl.h"

namespace rlsedit {

template <class T>
const Engine<T>* baseline_engine() {
  static constexpr Engine<T> table = Kernels<T, 16>::table("baseline");
  return &table;
}

template const Engine<float>* baseline_engine<float>();
template const Engine<double>* baseline_engine<double>();

}  // namespace rlsedit
