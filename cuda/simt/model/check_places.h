// Places in kernels, as small numbers: where an instrumented access was made (a program counter) or where the model was
// called (a Site). Program counters become source lines by addr2line, when a report or the counters need them.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../cpu/model.h"

namespace simt::model::check {

uint16_t place_of(const void* return_address);  // of a hook: the access is just before
uint16_t place_of(Site site);
Site read_line(uint16_t place);                      // the kernel's line; `file` lives as long as the program
std::string line_text(uint16_t place);               // "cuda/matmul/05_tile.cu:12"
void read_lines(const std::vector<uint16_t>& places);  // all at once: one addr2line a module

// The path below the repository's root, else the last component.
std::string short_path(const std::string& path);

}  // namespace simt::model::check
