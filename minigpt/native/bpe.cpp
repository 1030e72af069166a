// The Python module minigpt._bpe: splitting, training and encoding, with the GIL released while they work.
// Arguments are trusted: minigpt.tokenizer has checked them. Texts are bytes; ids come back as uint16 or uint32 arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "encoder.hpp"
#include "splitter.hpp"
#include "trainer.hpp"

namespace py = pybind11;
using bpe::Counter, bpe::Encoder, bpe::Splitter, bpe::Style, bpe::Trainer;

using Ends = py::array_t<uint64_t, py::array::c_style | py::array::forcecast>;
using Ids = py::array_t<uint32_t, py::array::c_style | py::array::forcecast>;

namespace {

Splitter splitter(const py::tuple& style, const py::bytes& kinds) {
  return {{style[0].cast<bool>(), style[1].cast<int>(), style[2].cast<bool>()}, std::string(kinds)};
}

std::string_view view(const py::bytes& text) {
  return {PyBytes_AS_STRING(text.ptr()), size_t(PyBytes_GET_SIZE(text.ptr()))};
}

std::vector<std::string_view> views(const std::vector<py::bytes>& texts) {
  std::vector<std::string_view> out;
  for (const auto& text : texts) out.push_back(view(text));
  return out;
}

std::vector<uint64_t> checked(const Ends& ends, size_t size) {
  std::vector<uint64_t> out(ends.data(), ends.data() + ends.size());
  uint64_t last = 0;
  for (const uint64_t end : out) {
    if (end <= last || end > size) throw py::value_error("ends must increase and lie within the text");
    last = end;
  }
  if (last != size) throw py::value_error("the last end must be the end of the text");
  return out;
}

template <class Id>
py::array to_array(const std::vector<uint32_t>& ids) {
  py::array_t<Id> array(ids.size());
  std::copy(ids.begin(), ids.end(), array.mutable_data());
  return array;
}

template <class Range>
py::array_t<uint32_t> to_rows(const Range& rows, py::ssize_t width) {
  py::array_t<uint32_t> array({py::ssize_t(rows.size()), width});
  if (rows.size()) std::memcpy(array.mutable_data(), rows.data(), rows.size() * width * sizeof(uint32_t));
  return array;
}

std::unique_ptr<Encoder> make_encoder(const std::vector<py::bytes>& tokens, const std::vector<uint32_t>& ids,
                                      const std::optional<Ids>& merges, bool whole, const py::tuple& style,
                                      const py::bytes& kinds) {
  std::vector<Encoder::Triple> rows(merges ? merges->shape(0) : 0);
  if (merges && !rows.empty()) std::memcpy(rows.data(), merges->data(), rows.size() * sizeof(Encoder::Triple));
  return std::make_unique<Encoder>(views(tokens), ids, merges ? &rows : nullptr, whole, splitter(style, kinds));
}

py::array encode(Encoder& self, const py::bytes& text, const std::optional<Ends>& ends, bool wide) {
  std::vector<uint32_t> ids;
  std::vector<uint64_t> stops;
  if (ends) stops = checked(*ends, view(text).size());
  {
    py::gil_scoped_release release;
    self.encode(view(text), ends ? &stops : nullptr, ids);
  }
  return wide ? to_array<uint32_t>(ids) : to_array<uint16_t>(ids);
}

std::vector<py::array> encode_batch(Encoder& self, const std::vector<py::bytes>& texts, size_t threads, bool wide) {
  const auto all = views(texts);
  std::vector<std::vector<uint32_t>> ids;
  {
    py::gil_scoped_release release;
    ids = self.encode_batch(all, threads);
  }
  std::vector<py::array> out;
  for (auto& one : ids) {
    out.push_back(wide ? to_array<uint32_t>(one) : to_array<uint16_t>(one));
    std::vector<uint32_t>().swap(one);  // not both copies of everything at once
  }
  return out;
}

py::array_t<uint64_t> split(const py::bytes& text, const py::tuple& style, const py::bytes& kinds) {
  const Splitter split = splitter(style, kinds);
  const std::string_view all = view(text);
  std::vector<uint64_t> ends;
  for (const char *p = all.data(), *end = p + all.size(); p < end;) {
    p = split.next(p, end);
    ends.push_back(p - all.data());
  }
  return py::array_t<uint64_t>(ends.size(), ends.data());
}

// The bytes of all ids; token i is blob[starts[i] : starts[i + 1]]. None if an id has no token, that is, no bytes.
py::object join(const Ids& ids, const py::bytes& blob, const Ends& starts) {
  const uint32_t* id = ids.data();
  const auto most = static_cast<size_t>(starts.size()) - 1;
  size_t total = 0;
  for (py::ssize_t i = 0; i < ids.size(); ++i) {
    if (id[i] >= most || starts.data()[id[i]] == starts.data()[id[i] + 1]) return py::none();
    total += starts.data()[id[i] + 1] - starts.data()[id[i]];
  }
  py::bytes out = py::reinterpret_steal<py::bytes>(PyBytes_FromStringAndSize(nullptr, py::ssize_t(total)));
  if (!out) throw py::error_already_set();
  char* to = PyBytes_AS_STRING(out.ptr());
  for (py::ssize_t i = 0; i < ids.size(); ++i) {
    const size_t start = starts.data()[id[i]], size = starts.data()[id[i] + 1] - start;
    std::memcpy(to, view(blob).data() + start, size);
    to += size;
  }
  return out;
}

// Counts pre-tokens over many calls, then trains.
class BoundTrainer {
 public:
  BoundTrainer(const py::tuple& style, const py::bytes& kinds) : splitter_(splitter(style, kinds)) {}

  void count(const std::vector<py::bytes>& texts, size_t threads) {
    const auto all = views(texts);
    py::gil_scoped_release release;
    counter_.count(splitter_, all, threads);
  }

  void count_pieces(const py::bytes& text, const Ends& ends) {
    const std::string_view all = view(text);
    uint64_t start = 0;
    for (const uint64_t end : checked(ends, all.size())) {
      counter_.count(all.substr(start, end - start));
      start = end;
    }
  }

  py::array_t<uint32_t> merges(size_t wanted, const py::bytes& order) {
    if (view(order).size() != 256) throw py::value_error("expected the symbols of the 256 bytes");
    std::vector<std::pair<uint32_t, uint32_t>> pairs;
    {
      py::gil_scoped_release release;
      pairs = Trainer(counter_.total(), reinterpret_cast<const uint8_t*>(view(order).data())).merges(wanted);
    }
    return to_rows(pairs, 2);
  }

 private:
  Splitter splitter_;
  Counter counter_;
};

}  // namespace

PYBIND11_MODULE(_bpe, module) {
  module.doc() = "Byte-level BPE in C++; minigpt.tokenizer is the way to it.";
  module.def("split", &split, py::arg("text"), py::arg("style"), py::arg("kinds"), "uint64 ends of the pre-tokens");
  module.def("join", &join, py::arg("ids"), py::arg("blob"), py::arg("starts"), "the tokens' bytes, or None");
  py::class_<BoundTrainer>(module, "Trainer")
      .def(py::init<const py::tuple&, const py::bytes&>(), py::arg("style"), py::arg("kinds"))
      .def("count", &BoundTrainer::count, py::arg("texts"), py::arg("threads"))
      .def("count_pieces", &BoundTrainer::count_pieces, py::arg("text"), py::arg("ends"))
      .def("merges", &BoundTrainer::merges, py::arg("wanted"), py::arg("order"), "uint32 (merges, 2) symbols");
  py::class_<Encoder>(module, "Encoder")
      .def(py::init(&make_encoder), py::arg("tokens"), py::arg("ids"), py::arg("merges"), py::arg("whole"),
           py::arg("style"), py::arg("kinds"))
      .def("encode", &encode, py::arg("text"), py::arg("ends"), py::arg("wide"))
      .def("encode_batch", &encode_batch, py::arg("texts"), py::arg("threads"), py::arg("wide"))
      .def("reduced", [](const Encoder& self) { return to_rows(self.reduced(), 3); },
           "uint32 (merges, 3): left, right, product ids; empty where the rule is not one merge a token");
}
