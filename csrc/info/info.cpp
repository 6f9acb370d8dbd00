// rlsedit_kernels._info: what is no op. How the native parts were built, and what they can do on this
// processor.
#include <pybind11/pybind11.h>

#include "engine.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = RLSEDIT_VERSION;
  info["compiler"] = RLSEDIT_COMPILER;
  info["flags"] = RLSEDIT_FLAGS;
  info["build_type"] = RLSEDIT_BUILD_TYPE;
  info["torch_target"] = RLSEDIT_TORCH_TARGET;
  info["torch_headers"] = RLSEDIT_TORCH_HEADERS;
  info["blas"] = "own product engine";
  return info;
}

template <class T>
py::dict describe(const rlsedit::Engine<T>& e) {
  py::dict info;
  info["name"] = e.name;
  info["block"] = py::make_tuple(e.mr, e.nr);
  info["kc"] = e.kc;
  return info;
}

template <class T>
py::dict engines() {
  py::dict all;
  all["in_use"] = describe(rlsedit::engine<T>());
  py::list compiled;
  compiled.append(rlsedit::baseline_engine<T>()->name);
  if (const auto* e = rlsedit::avx2_engine<T>()) compiled.append(e->name);
  if (const auto* e = rlsedit::avx512_engine<T>()) compiled.append(e->name);
  all["compiled"] = compiled;
  return all;
}

py::dict capabilities() {
  py::dict info;
  info["float32"] = engines<float>();
  info["float64"] = engines<double>();
#if defined(__x86_64__)
  py::list features;
  if (__builtin_cpu_supports("avx2")) features.append("avx2");
  if (__builtin_cpu_supports("fma")) features.append("fma");
  if (__builtin_cpu_supports("avx512f")) features.append("avx512f");
  info["features"] = features;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_info, m) {
  m.doc() = "Build information and capabilities of the native CPU library.";
  m.def("build_info", &build_info,
        "How the native parts were built.\n\n"
        "Returns:\n    dict: version, compiler, flags, build_type, torch_target (stable ABI), torch_headers, "
        "blas.");
  m.def("capabilities", &capabilities,
        "What the native library uses on this processor.\n\n"
        "Returns:\n    dict: per dtype the engines compiled in and the one in use (name, register block, "
        "columns per\n"
        "    pass), and the processor's vector features.");
}
