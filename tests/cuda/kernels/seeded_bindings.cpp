// The Python modules tests.cuda._seeded and _seeded_checked: runs a kernel with one of its mistakes on the CPU model.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>

#include "seeded.h"

namespace py = pybind11;

namespace {

const std::map<std::string, const seeded::Kernel*>& kernels() {
  static const std::map<std::string, const seeded::Kernel*> all = [] {
    std::map<std::string, const seeded::Kernel*> found;
    for (const seeded::Kernel* kernel : {&seeded::tiled(), &seeded::reduce(), &seeded::handoff(), &seeded::ampere(),
                                         &seeded::scale(), &seeded::staging(), &seeded::hopper(), &seeded::cluster(),
                                         &seeded::attention(), &seeded::turns(), &seeded::misuse()})
      found[kernel->name] = kernel;
    return found;
  }();
  return all;
}

// The largest error of the result; raises RuntimeError with the model's report.
double run(const std::string& kernel, const std::string& bug, int order, int async_, uint64_t seed, int workers,
           double timeout_s) {
  const seeded::Kernel& chosen = *kernels().at(kernel);
  int number = -1;
  for (size_t i = 0; i < chosen.bugs.size(); ++i)
    if (chosen.bugs[i] == bug) number = int(i);
  if (number < 0) throw py::value_error("no bug " + bug + " in " + kernel);
  simt::Options& options = simt::options();
  options = {};
  options.order = simt::Order(order);
  options.async = simt::Async(async_);
  options.seed = seed;
  options.workers = workers;
  options.timeout_s = timeout_s;
  py::gil_scoped_release released;
  return chosen.run(number);
}

}  // namespace

PYBIND11_MODULE(MODULE_NAME, module) {
  module.def("run", &run, py::arg("kernel"), py::arg("bug"), py::arg("order") = 0, py::arg("async_") = 1,
             py::arg("seed") = 1, py::arg("workers") = 0, py::arg("timeout_s") = 20.0);
  std::map<std::string, std::vector<std::string>> names;
  for (const auto& [name, kernel] : kernels()) names[name].assign(kernel->bugs.begin(), kernel->bugs.end());
  module.attr("KERNELS") = names;
}
