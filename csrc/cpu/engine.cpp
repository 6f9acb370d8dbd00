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

bool has_avx512() {
#if defined(__x86_64__)
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

template <class T>
const Engine<T>& choose() {
  const char* asked = std::getenv("RLSEDIT_CPU_ENGINE");
  const auto most = [asked](const char* name) { return asked != nullptr && std::strcmp(asked, name) == 0; };
  if (most("baseline")) return *baseline_engine<T>();
  const Engine<T>* best = !most("avx2") && has_avx512() ? avx512_engine<T>() : nullptr;
  if (best == nullptr && has_avx2()) best = avx2_engine<T>();
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
