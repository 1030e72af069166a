// Operations by name: a source of kernels registers one, and bindings.cpp runs it with arrays and numbers by name.
//
//   void run(const native::Arguments& given) { const native::View& x = given.array("x").expect_rank(2); ... }
//   const native::Operation registered("rmsnorm_forward", run);          // at namespace scope of a .cu or .cpp
//
// In Python: module.run("rmsnorm_forward", x=x, y=y, eps=1e-6, stream=0). So a new operation needs no bindings. What an
// operation is given is checked by the operation, since a wrong size is a wild write. No CUDA and no Python in here.
#pragma once
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "native/view.h"

namespace native {

class Arguments {
 public:
  std::map<std::string, std::vector<View>> arrays;  // one, or those of a list
  std::map<std::string, double> numbers;            // booleans too
  std::map<std::string, std::string> words;
  void* stream = nullptr;

  // Raise std::invalid_argument for what was not given.
  const View& array(const char* name) const {
    const View* const found = optional(name);
    return found ? *found : missing<View>(name, "an array");
  }
  const View* optional(const char* name) const {  // null: not given, or None
    const auto found = arrays.find(name);
    if (found == arrays.end()) return nullptr;
    if (found->second.size() != 1) throw std::invalid_argument(std::string(name) + ": expected one array, not a list");
    return &found->second[0];
  }
  const std::vector<View>& list(const char* name) const {
    const auto found = arrays.find(name);
    return found == arrays.end() ? missing<std::vector<View>>(name, "a list of arrays") : found->second;
  }
  double number(const char* name) const {
    const auto found = numbers.find(name);
    return found == numbers.end() ? missing<double>(name, "a number") : found->second;
  }
  int integer(const char* name) const {
    const double value = number(name);
    if (!(value >= -2147483648. && value <= 2147483647.) || value != double(int(value)))
      throw std::invalid_argument(std::string(name) + ": " + std::to_string(value) + ": expected an integer of 32 bits");
    return int(value);
  }
  bool flag(const char* name) const { return number(name) != 0; }
  const std::string& word(const char* name) const {
    const auto found = words.find(name);
    return found == words.end() ? missing<std::string>(name, "a word") : found->second;
  }

 private:
  template <class T>
  [[noreturn]] static const T& missing(const char* name, const char* kind) {
    throw std::invalid_argument(std::string(name) + ": expected " + kind);
  }
};

// The table of what is linked into this module. Hidden symbols: each module has its own.
using Run = void (*)(const Arguments&);
inline std::map<std::string, Run>& operations() {
  static auto* table = new std::map<std::string, Run>;
  return *table;
}
struct Operation {
  Operation(const char* name, Run run) { operations()[name] = run; }
};

}  // namespace native
