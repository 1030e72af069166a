// Program counters to source lines. Code inlined from simt/ptx/ and simt/cpu/ counts for the kernel's line that calls
// it.
#if defined(SIMT_CHECKED)
#include "check_places.h"

#include <dlfcn.h>
#include <link.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <set>
#include <unordered_map>

#include "state.h"

namespace simt::model::check {

namespace {

struct Place {
  const char* pc = nullptr;  // null: a Site
  Site site{"?", 0};
  bool known = false;
};

std::vector<Place> places(1);  // 0: unknown
std::unordered_map<const void*, uint16_t> by_pc;
std::unordered_map<std::string, uint16_t> by_site;
std::set<std::string> file_names;

const char* keep(const std::string& name) { return file_names.insert(name).first->c_str(); }

uint16_t add(Place place) {
  if (places.size() > 65535) return 0;
  places.push_back(place);
  return uint16_t(places.size() - 1);
}

bool contains(const std::string& path, const char* part) { return path.find(part) != std::string::npos; }

bool is_ours(const std::string& path) {
  return !contains(path, "/simt/ptx/") && !contains(path, "/simt/cpu/") && !contains(path, "/usr/") &&
         !contains(path, "/c++/") && path[0] != '?';
}

struct Module {
  std::string file;
  uintptr_t base = 0;
};

Module module_of(const char* pc) {
  struct Search {
    uintptr_t pc;
    Module found;
  } search{reinterpret_cast<uintptr_t>(pc), {}};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* pointer) {
        auto& search = *static_cast<Search*>(pointer);
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          const uintptr_t start = info->dlpi_addr + header.p_vaddr;
          if (header.p_type != PT_LOAD || search.pc < start || search.pc >= start + header.p_memsz) continue;
          search.found = {info->dlpi_name[0] ? info->dlpi_name : "/proc/self/exe", info->dlpi_addr};
          return 1;
        }
        return 0;
      },
      &search);
  if (search.found.file == "/proc/self/exe") {  // addr2line is another process
    char path[4096];
    const ssize_t length = readlink("/proc/self/exe", path, sizeof path);
    if (length > 0) search.found.file.assign(path, size_t(length));
  }
  return search.found;
}

std::string quoted(const std::string& word) {
  std::string text = "'";
  for (char c : word) text += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return text + "'";
}

void fall_back(Place& place) {
  place.known = true;
  Dl_info info;
  if (!dladdr(place.pc, &info)) return;
  const char* base = static_cast<const char*>(info.dli_sname ? info.dli_saddr : info.dli_fbase);
  char offset[32];
  snprintf(offset, sizeof offset, "+0x%zx", size_t(place.pc - base));
  place.site = {keep((info.dli_sname ? info.dli_sname : short_path(info.dli_fname)) + std::string(offset)), 0};
}

// The frames of one address, innermost first; the first of our own files wins, else the last.
void take_frame(Place& place, const std::string& line) {
  std::string text = line.substr(0, line.find(" (disc"));
  const size_t colon = text.rfind(':');
  if (place.known || colon == std::string::npos || text[0] == '?') return;
  const int number = atoi(text.c_str() + colon + 1);
  if (!number) return;
  const std::string path = text.substr(0, colon);
  place.site = {keep(short_path(path)), number};
  place.known = is_ours(path);
}

void ask(const Module& module, const std::vector<Place*>& wanted) {
  std::string command = "addr2line -a -i -e " + quoted(module.file);
  for (const Place* place : wanted) {
    char address[24];
    snprintf(address, sizeof address, " 0x%zx", size_t(reinterpret_cast<uintptr_t>(place->pc) - module.base));
    command += address;
  }
  FILE* answer = popen((command + " 2>/dev/null").c_str(), "r");
  if (!answer) return;
  char line[4096];
  size_t next = 0;
  while (fgets(line, sizeof line, answer)) {
    line[strcspn(line, "\n")] = 0;
    if (!strncmp(line, "0x", 2) && !strchr(line, ':')) ++next;
    else if (next && next <= wanted.size()) take_frame(*wanted[next - 1], line);
  }
  pclose(answer);
}

}  // namespace

std::string short_path(const std::string& path) {
  for (const std::string folder : {"tests/", "cuda/"}) {
    const size_t start = path.rfind("/" + folder);
    if (start != std::string::npos) return path.substr(start + 1);
    if (path.compare(0, folder.size(), folder) == 0) return path;
  }
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? path : path.substr(slash + 1);
}

uint16_t place_of(const void* return_address) {
  static struct {
    const void* pc;
    uint16_t place;
  } recent[1024];
  auto& slot = recent[reinterpret_cast<uintptr_t>(return_address) % 1024];
  if (slot.pc == return_address) return slot.place;
  auto [found, is_new] = by_pc.try_emplace(return_address, 0);
  if (is_new) {
    Place place;
    place.pc = static_cast<const char*>(return_address) - 1;
    found->second = add(place);
  }
  slot = {return_address, found->second};
  return slot.place;
}

uint16_t place_of(Site site) {
  static struct {
    Site site;
    uint16_t place;
  } recent[256];
  auto& slot = recent[(reinterpret_cast<uintptr_t>(site.file) + size_t(site.line) * 31) % 256];
  if (slot.site.file == site.file && slot.site.line == site.line && slot.place) return slot.place;
  auto [found, is_new] = by_site.try_emplace(std::string(site.file) + ":" + std::to_string(site.line), 0);
  if (is_new) {
    Place place;
    place.site = {keep(short_path(site.file)), site.line};
    place.known = true;
    found->second = add(place);
  }
  slot = {site, found->second};
  return slot.place;
}

void read_lines(const std::vector<uint16_t>& numbers) {
  std::map<std::string, std::pair<Module, std::vector<Place*>>> modules;
  for (uint16_t number : numbers) {
    Place& place = places[number];
    if (place.known || !place.pc) continue;
    Module module = module_of(place.pc);
    auto& entry = modules[module.file];
    entry.first = module;
    entry.second.push_back(&place);
  }
  for (auto& [file, entry] : modules) {
    if (!file.empty()) ask(entry.first, entry.second);
    for (Place* place : entry.second) {
      if (place->site.line) place->known = true;
      if (!place->known) fall_back(*place);
    }
  }
}

Site read_line(uint16_t place) {
  read_lines({place});
  return places[place].site;
}

std::string line_text(uint16_t place) {
  const Site site = read_line(place);
  return site.line ? at(site) : site.file;
}

}  // namespace simt::model::check
#endif
