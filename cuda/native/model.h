// What bindings add for the CPU model: how a launch is run (`options`), what its arrays are called in reports, its Error.
#pragma once
#include <array>
#include <mutex>
#include <vector>

#include "dlpack.h"
#include "simt/cpu/model.h"
#include "simt/cpu/trace.h"
#if defined(SIMT_CHECKED)
#include "simt/cpu/counters.h"
#endif

namespace native {

constexpr int device_type = 1;
constexpr const char* device_name = "cpu";
inline void require_device() {}

// While this lives the kernels may touch these arrays and nothing else. Made without the GIL: calls take turns.
class Running {
 public:
  explicit Running(const std::vector<const View*>& arrays) : lock_(mutex()) {
    for (const View* array : arrays)
      if (array) simt::register_buffer(array->data, size_t(array->bytes()), array->name.c_str());
  }
  ~Running() { simt::unregister_buffers(); }
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;

 private:
  static std::mutex& mutex() {
    static std::mutex one;
    return one;
  }
  std::lock_guard<std::mutex> lock_;
};

// The index of a word among those allowed.
template <size_t count>
int choice(const char* key, const std::string& word, const std::array<const char*, count>& words) {
  std::string all;
  for (size_t i = 0; i < count; ++i) {
    if (word == words[i]) return int(i);
    all += std::string(i ? ", " : "") + words[i];
  }
  throw std::invalid_argument(std::string(key) + " '" + word + "': expected one of " + all);
}

constexpr std::array<const char*, 4> orders = {"fifo", "reverse", "random", "priority"};
constexpr std::array<const char*, 3> asyncs = {"eager", "lazy", "random"};

// `with options(order="random", seed=3):` holds for the calls inside, in this OS thread; what is not named stays.
class OptionsScope {
 public:
  explicit OptionsScope(const py::kwargs& wanted) : wanted_(simt::options()) {
    for (const auto& [key_object, value] : wanted) {
      const auto key = key_object.cast<std::string>();
      if (key == "workers") wanted_.workers = at_least(0, key, value.cast<int>());
      else if (key == "multiprocessors") wanted_.multiprocessors = at_least(1, key, value.cast<int>());
      else if (key == "order") wanted_.order = simt::Order(choice("order", value.cast<std::string>(), orders));
      else if (key == "async_") wanted_.async = simt::Async(choice("async_", value.cast<std::string>(), asyncs));
      else if (key == "seed") wanted_.seed = value.cast<uint64_t>();
      else if (key == "timeout_s") wanted_.timeout_s = value.cast<double>();
      else if (key == "trace") wanted_.trace = value.cast<bool>();
      else if (key == "counters") wanted_.counters = value.cast<bool>();
      else throw std::invalid_argument("option '" + key + "': expected one of workers, multiprocessors, order, async_, "
                                       "seed, timeout_s, trace, counters");
    }
    if (!(wanted_.timeout_s > 0)) throw std::invalid_argument("timeout_s: expected a number of seconds above 0");
  }
  void enter() {
    before_ = simt::options();
    simt::options() = wanted_;
  }
  void exit() { simt::options() = before_; }

 private:
  static int at_least(int least, const std::string& key, int value) {
    if (value < least)
      throw std::invalid_argument(key + " " + std::to_string(value) + ": expected at least " + std::to_string(least));
    return value;
  }
  simt::Options wanted_, before_;
};

inline void bind_device(py::module_& module) {
  py::register_local_exception<simt::Error>(module, "Error", PyExc_RuntimeError).attr("__doc__") =
      "A mistake in a kernel that the model found; the text is its report.";
  py::class_<OptionsScope>(module, "options", py::module_local(),
                           "with options(workers=, order=, async_=, seed=, multiprocessors=, timeout_s=, trace=, counters=): how the "
                           "model runs the calls inside, in this OS thread")
      .def(py::init<const py::kwargs&>())
      .def("__enter__", &OptionsScope::enter)
      .def("__exit__", [](OptionsScope& self, const py::args&) { self.exit(); });
  module.def("take_trace", [] {
    py::list rows;
    for (const simt::TraceEvent& e : simt::take_trace())
      rows.append(py::make_tuple(e.block, e.thread, e.kind, e.first, e.second, e.file, e.line));
    return rows;
  }, "tuples (block, thread, kind, first, second, file, line), see simt/cpu/trace.h: what this thread's launches under options(trace=True) did, since the last call");
#if defined(SIMT_CHECKED)
  module.def("take_counters", [] {
    py::list rows;
    for (const simt::CounterRow& row : simt::take_counters()) {
      py::dict one;
      one["file"] = row.file;
      one["line"] = row.line;
      one["kind"] = row.kind;
      one["requests"] = row.requests;
      one["bytes"] = row.bytes;
      one["actual"] = row.actual;
      one["ideal"] = row.ideal;
      rows.append(one);
    }
    return rows;
  }, "dicts, see simt/cpu/counters.h: what this thread's launches under options(counters=True) did, since the last call");
#endif
}

}  // namespace native
