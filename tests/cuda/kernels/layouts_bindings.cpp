// The Python modules tests.cuda._layouts (CPU model) and _layouts_sm90 (GPU): layouts.h for arrays of 16-bit elements,
// which stand for raw bytes. Every array is dense and of one dimension. Refused with std::invalid_argument: arrays
// smaller than what a kernel touches of them; offsets inside of an image are the test's to get right.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "layouts.h"
#include NATIVE_DEVICE

namespace {

namespace py = pybind11;
using native::Array;
using Integers = std::vector<int64_t>;

Array bytes_of(const char* name, const py::object& object, int64_t least, bool written = true) {
  Array array(name, object, native::device_type, written);
  if (array.rank != 1 || array.stride[0] != 1 || array.bytes() < least || array.bytes() % 4)
    array.refuse("shape " + array.shape() + ": expected one dense dimension of at least " + std::to_string(least) +
                 " bytes");
  return array;
}
Array image_of(const py::object& object, int64_t blocks = 1) {
  Array image = bytes_of("image", object, 16);
  if (image.bytes() > blocks * layouts::image_bytes) image.refuse("expected at most 64 KiB for each block");
  return image;
}
// While this lives a kernel may run on these arrays; other Python threads go on.
struct Running {
  py::gil_scoped_release release;
  native::Running running;
  explicit Running(std::initializer_list<const Array*> arrays) : running({arrays.begin(), arrays.end()}) {}
};
template <class T>
T* words(const Array& array) { return reinterpret_cast<T*>(array.data); }

// box: a dict of type, size, stride, box, step, swizzle, coordinates (lists are innermost first), offset and bytes
layouts::Box box_of(const Array& tensor, const py::dict& box) {
  const auto list = [&](const char* key) { return box[key].cast<Integers>(); };
  const auto size = list("size"), stride = list("stride"), extent = list("box"), step = list("step");
  const auto at = list("coordinates");
  layouts::Box b = {};
  b.tensor = tensor.data;
  b.type = simt::DataType(box["type"].cast<int>());
  b.swizzle = simt::Swizzle(box["swizzle"].cast<int>());
  b.offset = box["offset"].cast<int>();
  b.bytes = box["bytes"].cast<uint32_t>();
  b.shape.rank = int(size.size());
  if (size.empty() || size.size() > 5 || stride.size() + 1 != size.size() || extent.size() != size.size() ||
      step.size() != size.size() || at.size() != size.size())
    throw std::invalid_argument("box: expected 1 to 5 dimensions, and one stride less");
  for (size_t i = 0; i < size.size(); ++i) {
    b.shape.size[i] = uint64_t(size[i]);
    b.shape.box[i] = uint32_t(extent[i]);
    b.shape.step[i] = uint32_t(step[i]);
    b.coordinates[i] = int(at[i]);
    if (i) b.shape.stride[i - 1] = uint64_t(stride[i - 1]);
  }
  return b;
}

// operand: a dict of offset, leading, stride, mn_major and steps
layouts::Operand operand_of(const py::dict& operand, int steps) {
  layouts::Operand o = {operand["offset"].cast<int>(), operand["leading"].cast<int>(), operand["stride"].cast<int>(),
                        operand["mn_major"].cast<bool>(), {}};
  const auto step = operand["steps"].cast<Integers>();
  if (steps < 1 || steps > layouts::most_steps || step.size() != size_t(steps))
    throw std::invalid_argument("operand: expected 1 to 8 steps, as many for a as for b");
  for (int i = 0; i < steps; ++i) o.step[i] = int(step[size_t(i)]);
  return o;
}

void tma_load(const py::object& tensor_object, const py::object& image_object, const py::dict& box) {
  const Array tensor = bytes_of("tensor", tensor_object, 16), image = image_of(image_object);
  const layouts::Box b = box_of(tensor, box);
  Running running({&tensor, &image});
  layouts::tma_load(b, image.data, int(image.bytes()));
}
void tma_store(const py::object& tensor_object, const py::object& image_object, const py::dict& box, bool add) {
  const Array tensor = bytes_of("tensor", tensor_object, 16), image = image_of(image_object);
  const layouts::Box b = box_of(tensor, box);
  Running running({&tensor, &image});
  layouts::tma_store(b, image.data, int(image.bytes()), add);
}
void tma_multicast(const py::object& tensor_object, const py::object& images_object, const py::dict& box, int blocks,
                   int source, int mask) {
  if (blocks < 2 || blocks > 8) throw std::invalid_argument("blocks " + std::to_string(blocks) + ": expected 2 to 8");
  const Array tensor = bytes_of("tensor", tensor_object, 16), images = image_of(images_object, blocks);
  const layouts::Box b = box_of(tensor, box);
  Running running({&tensor, &images});
  layouts::tma_multicast(b, images.data, int(images.bytes() / blocks), blocks, source, mask);
}
void cluster_ring(const py::object& received_object, const py::object& tested_object, int blocks) {
  const Array received = bytes_of("received", received_object, 128 * blocks);
  const Array tested = bytes_of("tested", tested_object, 8 * blocks);
  Running running({&received, &tested});
  layouts::cluster_ring(words<uint32_t>(received), words<uint32_t>(tested), blocks);
}

void matrices(bool load, const py::object& image_object, const py::object& offsets_object,
              const py::object& registers_object, int count, bool transpose) {
  const Array image = image_of(image_object), offsets = bytes_of("offsets", offsets_object, 128);
  const Array registers = bytes_of("registers", registers_object, 128 * count);
  Running running({&image, &offsets, &registers});
  const auto call = [&](auto function) {
    function(image.data, int(image.bytes()), words<uint32_t>(offsets), count, transpose, words<uint32_t>(registers));
  };
  load ? call(layouts::ldmatrix) : call(layouts::stmatrix);
}
void mma(const py::object& a_object, const py::object& b_object, const py::object& c_object, const py::object& d_object,
         bool f16) {
  const Array a = bytes_of("a", a_object, 512), b = bytes_of("b", b_object, 256);
  const Array c = bytes_of("c", c_object, 512), d = bytes_of("d", d_object, 512);
  Running running({&a, &b, &c, &d});
  layouts::mma_m16n8k16(f16, words<uint32_t>(a), words<uint32_t>(b), words<float>(c), words<float>(d));
}

// a: a dict, or an array of registers.
void wgmma(const py::object& image_object, const py::object& a, const py::dict& b, const py::object& d_object,
           const py::object& descriptors_object, int n, bool f16, int swizzle, bool accumulate) {
  const int steps = int(py::len(b["steps"]));
  const layouts::Product product = {n, f16, simt::Swizzle(swizzle), steps, accumulate};
  const layouts::Operand operand_b = operand_of(b, steps);
  const Array image = image_of(image_object), d = bytes_of("d", d_object, 256 * n);
  const Array descriptors = bytes_of("descriptors", descriptors_object, 24);
  if (py::isinstance<py::dict>(a)) {
    const layouts::Operand operand_a = operand_of(a.cast<py::dict>(), steps);
    Running running({&image, &d, &descriptors});
    layouts::wgmma_shared(product, operand_a, operand_b, image.data, int(image.bytes()), words<float>(d),
                          words<uint64_t>(descriptors));
  } else {
    const Array registers = bytes_of("a", a, 2048 * steps);
    Running running({&image, &registers, &d});
    layouts::wgmma_registers(product, words<uint32_t>(registers), operand_b, image.data, int(image.bytes()),
                             words<float>(d));
  }
}

}  // namespace

PYBIND11_MODULE(MODULE_NAME, module) {
  module.attr("device") = native::device_name;
  native::bind_device(module);
  module.def("tma_load", &tma_load);
  module.def("tma_store", &tma_store);
  module.def("tma_multicast", &tma_multicast);
  module.def("cluster_ring", &cluster_ring);
  module.def("ldmatrix", [](const py::object& i, const py::object& o, const py::object& r, int count, bool transpose) {
    matrices(true, i, o, r, count, transpose);
  });
  module.def("stmatrix", [](const py::object& i, const py::object& o, const py::object& r, int count, bool transpose) {
    matrices(false, i, o, r, count, transpose);
  });
  module.def("mma", &mma);
  module.def("wgmma", &wgmma);
}
