// The Python modules cuda._simt, _simt_checked, _sm90 and _sm80: one file, compiled with another device for each.
// Layouts are read off the strides. Everything a kernel relies on is checked here, since a wrong size is a wild write;
// the way in for people is cuda/ops.py, which allocates the result and picks the step.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>
#include <limits>
#include <optional>
#include <variant>
#include <vector>

#include "matmul/matmul.h"
#include "native/operation.h"
#include NATIVE_DEVICE

namespace matmul {

// Weak: a step whose source is not in this module is null here.
#define WEAK __attribute__((weak))
WEAK void naive_01(const Problem&);
WEAK void coalesced_02(const Problem&);
WEAK void shared_03(const Problem&);
WEAK void register_tile_1d_04(const Problem&);
WEAK void register_tile_2d_05(const Problem&);
WEAK void vectorised_06(const Problem&);
WEAK void warp_tile_07(const Problem&);
WEAK void mma_sync_08(const Problem&);
WEAK void wgmma_09(const Problem&);
WEAK void wgmma_128x128_10(const Problem&);
WEAK void producer_consumer_11(const Problem&);
WEAK void two_consumers_12(const Problem&);
WEAK void persistent_13(const Problem&);
WEAK void multicast_14(const Problem&);
WEAK void tma_store_15(const Problem&);
WEAK void best_16(const Problem&, const Tiling&);
#undef WEAK

}  // namespace matmul

namespace {

namespace py = pybind11;
using matmul::Problem, matmul::Tiling;
using native::Array;
using simt::DataType;

struct Step {
  int number;
  const char* name;
  void (*run)(const Problem&);
  bool half;     // bfloat16 and float16; otherwise float32
  bool tma;      // addresses and strides must be multiples of 16 bytes
  bool tilings;  // takes a tiling: run by best_16
};

const Step ladder[] = {
    {1, "naive_01", matmul::naive_01, false, false, false},
    {2, "coalesced_02", matmul::coalesced_02, false, false, false},
    {3, "shared_03", matmul::shared_03, false, false, false},
    {4, "register_tile_1d_04", matmul::register_tile_1d_04, false, false, false},
    {5, "register_tile_2d_05", matmul::register_tile_2d_05, false, false, false},
    {6, "vectorised_06", matmul::vectorised_06, false, false, false},
    {7, "warp_tile_07", matmul::warp_tile_07, false, false, false},
    {8, "mma_sync_08", matmul::mma_sync_08, true, false, false},
    {9, "wgmma_09", matmul::wgmma_09, true, true, false},
    {10, "wgmma_128x128_10", matmul::wgmma_128x128_10, true, true, false},
    {11, "producer_consumer_11", matmul::producer_consumer_11, true, true, false},
    {12, "two_consumers_12", matmul::two_consumers_12, true, true, false},
    {13, "persistent_13", matmul::persistent_13, true, true, false},
    {14, "multicast_14", matmul::multicast_14, true, true, false},
    {15, "tma_store_15", matmul::tma_store_15, true, true, false},
    {16, "best_16", nullptr, true, true, true},
};

bool built(const Step& step) { return step.tilings ? matmul::best_16 != nullptr : step.run != nullptr; }

const Step& find_step(const std::variant<int, std::string>& wanted) {
  std::string all;
  for (const Step& step : ladder) {
    if (!built(step)) continue;
    const bool found = wanted.index() ? std::get<1>(wanted) == step.name : std::get<0>(wanted) == step.number;
    if (found) return step;
    all += std::string(all.empty() ? "" : ", ") + step.name;
  }
  const std::string word = wanted.index() ? "'" + std::get<1>(wanted) + "'" : std::to_string(std::get<0>(wanted));
  throw std::invalid_argument("step " + word + ": this module has " + (all.empty() ? "none" : all));
}

// How the last two dimensions of an array lie in memory.
struct Layout {
  bool transposed;  // the columns are contiguous
  int64_t leading, batch;
};

// Of a rows x columns matrix or a stack of them. A dimension of size 1 may have any stride; a leading dimension that
// addresses nothing is made one that TMA can describe.
Layout layout_of(const Array& x, bool may_transpose) {
  const int last = x.rank - 1;
  const int64_t rows = x.size[last - 1], columns = x.size[last], down = x.stride[last - 1], right = x.stride[last];
  const int64_t batch = x.rank == 3 && x.size[0] > 1 ? x.stride[0] : 0;
  const auto free = [](int64_t width) { return (width + 15) / 16 * 16; };
  if (batch >= 0) {
    const bool as_column = may_transpose && columns == 1 && rows > 1 && down == 1;
    if ((right == 1 || columns == 1) && (rows == 1 || down >= columns) && !as_column)
      return {false, rows == 1 ? free(columns) : down, batch};
    if (may_transpose && (down == 1 || rows == 1) && (columns == 1 || right >= rows))
      return {true, columns == 1 ? free(rows) : right, batch};
  }
  x.refuse("shape " + x.shape() + " with strides " + x.strides() + ": expected rows without gaps inside, one after the other" +
           (may_transpose ? ", or the transpose of that; call .contiguous()" : ""));
}

int positive(int64_t size, const char* letter) {
  if (size <= 0 || size > std::numeric_limits<int>::max())
    throw std::invalid_argument(std::string(letter) + " = " + std::to_string(size) + ": expected 1 to 2147483647");
  return int(size);
}

void expect_shape(const Array& x, int64_t batch, int64_t rows, int64_t columns) {
  const bool matrix = x.rank == 2 || (x.rank == 3 && (x.size[0] == batch || x.size[0] == 1));
  if (matrix && x.size[x.rank - 2] == rows && x.size[x.rank - 1] == columns) return;
  const std::string size = std::to_string(rows) + ", " + std::to_string(columns) + ")";
  x.refuse("shape " + x.shape() + ": expected (" + size + (batch > 1 ? " or (" + std::to_string(batch) + ", " + size : ""));
}

matmul::Activation activation_of(const std::string& word) {
  if (word == "none") return matmul::Activation::none;
  if (word == "gelu") return matmul::Activation::gelu;
  if (word == "swiglu") return matmul::Activation::swiglu;
  throw std::invalid_argument("activation '" + word + "': expected one of none, gelu, swiglu");
}

void expect_type(const Array& x, DataType type) {
  if (x.type != type) x.refuse(std::string("is ") + native::name_of(x.type) + ": expected " + native::name_of(type));
}

// What is not given has matmul.h's default.
Tiling tiling_of(const std::vector<int>& given) {
  Tiling t;
  int caches[] = {int(t.cache_a), int(t.cache_b), int(t.cache_d)};
  int* fields[] = {&t.tile_m, &t.tile_n, &t.cluster, &t.split_k, &t.raster, &t.stagger, &caches[0], &caches[1], &caches[2]};
  if (given.size() > std::size(fields))
    throw std::invalid_argument("tiling of " + std::to_string(given.size()) + " numbers: expected at most 9");
  for (size_t i = 0; i < given.size(); ++i) *fields[i] = given[i];
  for (const int cache : caches)
    if (cache < 0 || cache > 2) throw std::invalid_argument("tiling: cache " + std::to_string(cache) + ": expected 0, 1 or 2");
  t.cache_a = matmul::Cache(caches[0]);
  t.cache_b = matmul::Cache(caches[1]);
  t.cache_d = matmul::Cache(caches[2]);
  return t;
}

// Sizes, layouts and types of the product; p.alpha, p.beta and p.activation are set.
void describe(Problem& p, const Array& a, const Array& b, const Array& d, const Array* c, const Array* bias) {
  for (const Array* x : {&a, &b, &d, c})
    if (x && x->rank != 2 && x->rank != 3) x->refuse("shape " + x->shape() + ": expected 2 or 3 dimensions");
  const int64_t batch = std::max(a.rank == 3 ? a.size[0] : 1, b.rank == 3 ? b.size[0] : 1);
  p.m = positive(a.size[a.rank - 2], "m");
  p.k = positive(a.size[a.rank - 1], "k");
  p.n = positive(b.size[b.rank - 1], "n");
  p.batch = positive(batch, "batch");
  expect_shape(a, batch, p.m, p.k);
  expect_shape(b, batch, p.k, p.n);
  const bool halves = p.activation == matmul::Activation::swiglu;
  if (halves && p.n % 2) b.refuse(std::to_string(p.n) + " columns: expected an even number for swiglu");
  const int64_t columns = halves ? p.n / 2 : p.n;
  expect_shape(d, batch, p.m, columns);
  if (batch > 1 && (d.rank == 2 || d.size[0] == 1)) d.refuse("shape " + d.shape() + ": expected room for the whole batch");
  expect_type(b, a.type);
  if (d.type != DataType::f32) expect_type(d, a.type);
  p.in = a.type;
  p.out = d.type;
  const Layout la = layout_of(a, true), lb = layout_of(b, true), ld = layout_of(d, false);
  if (batch > 1 && ld.batch < (p.m - 1) * ld.leading + columns)
    d.refuse("strides " + d.strides() + ": expected matrices that do not overlap");
  p.a = a.data, p.lda = la.leading, p.stride_a = la.batch, p.transpose_a = la.transposed;
  p.b = b.data, p.ldb = lb.leading, p.stride_b = lb.batch, p.transpose_b = lb.transposed;
  p.d = d.data, p.ldd = ld.leading, p.stride_d = ld.batch;
  if (c) {
    expect_shape(*c, batch, p.m, columns);
    expect_type(*c, d.type);
    const Layout lc = layout_of(*c, false);
    p.c = c->data, p.ldc = lc.leading, p.stride_c = lc.batch;
  } else if (p.beta != 0.f) {
    throw std::invalid_argument("beta " + std::to_string(p.beta) + " without c: expected c, or beta 0");
  }
  if (bias) {
    if (bias->rank != 1 || bias->size[0] != p.n || (p.n > 1 && bias->stride[0] != 1))
      bias->refuse("shape " + bias->shape() + " with strides " + bias->strides() + ": expected (" + std::to_string(p.n) +
                   ",) without gaps");
    expect_type(*bias, a.type);
    p.bias = bias->data;
  }
  for (const Array* x : {&b, &d, c, bias})
    if (x && x->device != a.device)
      x->refuse("is on device " + std::to_string(x->device) + ", a on " + std::to_string(a.device) + ": expected one device");
}

void run_matmul(const std::variant<int, std::string>& step_name, const py::object& a_object, const py::object& b_object,
                const py::object& d_object, const py::object& c_object, const py::object& bias_object, float alpha,
                float beta, const std::string& activation, const std::optional<std::vector<int>>& tiling,
                uintptr_t stream) {
  const Step& step = find_step(step_name);
  native::require_device();
  const auto array = [](const char* name, const py::object& object, bool written = false) {
    return Array(name, object, native::device_type, written);
  };
  const Array a = array("a", a_object), b = array("b", b_object), d = array("d", d_object, true);
  std::optional<Array> c, bias;
  if (!c_object.is_none()) c = array("c", c_object);
  if (!bias_object.is_none()) bias = array("bias", bias_object);
  Problem p = {};
  p.alpha = alpha;
  p.beta = beta;
  p.activation = activation_of(activation);
  p.stream = reinterpret_cast<void*>(stream);
  describe(p, a, b, d, c ? &*c : nullptr, bias ? &*bias : nullptr);
  if (tiling && !step.tilings) throw std::invalid_argument(std::string("tiling: ") + step.name + " has only its own");
  const Tiling shape = tiling ? tiling_of(*tiling) : Tiling();
  py::gil_scoped_release release;
  native::Running running({&a, &b, c ? &*c : nullptr, bias ? &*bias : nullptr, &d});
  if (step.tilings) matmul::best_16(p, shape);
  else step.run(p);
}

py::list steps() {
  py::list all;
  for (const Step& step : ladder) {
    if (!built(step)) continue;
    py::dict row;
    row["number"] = step.number;
    row["name"] = step.name;
    if (step.half) row["dtypes"] = py::make_tuple("bfloat16", "float16");
    else row["dtypes"] = py::make_tuple("float32");
    row["tma"] = step.tma;
    row["tilings"] = step.tilings;
    all.append(row);
  }
  return all;
}

// Arrays and numbers by name, for an operation that some source has registered; None counts as not given.
void run_operation(const std::string& name, const py::kwargs& given) {
  const auto found = native::operations().find(name);
  if (found == native::operations().end())
    throw std::invalid_argument("operation '" + name + "': this module has no such operation");
  native::require_device();
  native::Arguments arguments;
  std::vector<Array> owners;  // keep the memory alive
  const auto add = [&](const std::string& key, const py::object& value) {
    owners.emplace_back(key.c_str(), value, native::device_type, false, true);
    arguments.arrays[key].push_back(owners.back());
  };
  for (const auto& [key_object, value] : given) {
    const auto key = key_object.cast<std::string>();
    if (value.is_none()) continue;
    if (key == "stream") arguments.stream = reinterpret_cast<void*>(value.cast<uintptr_t>());
    else if (py::isinstance<py::str>(value)) arguments.words[key] = value.cast<std::string>();
    else if (py::isinstance<py::bool_>(value) || py::isinstance<py::int_>(value) || py::isinstance<py::float_>(value))
      arguments.numbers[key] = value.cast<double>();
    else if (py::isinstance<py::list>(value) || py::isinstance<py::tuple>(value)) {
      arguments.arrays[key];
      for (const auto& one : value) add(key, py::reinterpret_borrow<py::object>(one));
    } else add(key, py::reinterpret_borrow<py::object>(value));
  }
  for (const Array& x : owners)
    if (x.device != owners[0].device)
      x.refuse("is on device " + std::to_string(x.device) + ", " + owners[0].name + " on " +
               std::to_string(owners[0].device) + ": expected one device");
  py::gil_scoped_release release;
  std::vector<const native::View*> views;
  for (const Array& x : owners) views.push_back(&x);
  native::Running running(views);
  found->second(arguments);
}

py::list operation_names() {
  py::list all;
  for (const auto& [name, run] : native::operations()) all.append(name);
  return all;
}

void bind(py::module_& module) {
  module.doc() = "Handwritten CUDA kernels; cuda.ops is the way to them.";
  module.attr("device") = native::device_name;
  native::bind_device(module);
  module.def("run", &run_operation, py::arg("operation"),
             "run(operation, **arguments): arrays, lists of arrays, numbers and words by name; see native/operation.h. "
             "stream: a cudaStream_t as a number. Raises ValueError for what cannot be, before anything runs.");
  module.def("operations", &operation_names, "what `run` knows in this module");
  module.def("steps", &steps, "dicts: number, name, dtypes, whether TMA must describe the operands, whether it takes tilings");
  module.def("matmul", &run_matmul, py::arg("step"), py::arg("a"), py::arg("b"), py::arg("d"), py::kw_only(),
             py::arg("c") = py::none(), py::arg("bias") = py::none(), py::arg("alpha") = 1.f, py::arg("beta") = 0.f,
             py::arg("activation") = "none", py::arg("tiling") = py::none(), py::arg("stream") = 0,
             "d = activation(alpha * a @ b + bias) + beta * c by one step, a number or a name. Arrays have 2 dimensions, or 3 "
             "with a batch before; a and b are row-major or transposed views. tiling: tile_m, tile_n, cluster, split_k, "
             "raster, stagger, cache_a, cache_b, cache_d, or the first of these. stream: a cudaStream_t as a number. Raises ValueError for what cannot be, before anything runs.");
}

}  // namespace

PYBIND11_MODULE(MODULE_NAME, module) { bind(module); }
#if defined(OTHER_MODULE_NAME)  // one object file for two modules, which differ in the steps that they are linked with
PYBIND11_MODULE(OTHER_MODULE_NAME, module) { bind(module); }
#endif
