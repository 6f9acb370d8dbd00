#include "engine.h"

#include <cstdlib>
#include <cstring>

namespace rlsedit {
namespace {

bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

template <class T>
const Engine<T>& choose() {
  const char* forced = std::getenv("RLSEDIT_CPU_ENGINE");
  const bool plain = forced != nullptr && std::strcmp(forced, "baseline") == 0;
  const Engine<T>* best = !plain && has_avx2() ? avx2_engine<T>() : nullptr;
  return best != nullptr ? *best : *baseline_engine<T>();
}

}  // namespace

template <class T>
const Engine<T>& engine() {
  static const Engine<T>& chosen = choose<T>();
  return chosen;
}

template const Engine<float>& engine<float>();
template const Engine<double>& engine<double>();

}  // namespace rlsedit
