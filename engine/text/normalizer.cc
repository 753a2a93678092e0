#include "engine/text/normalizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <vector>

#include "engine/text/utf8.h"

namespace compact::engine {
namespace {

struct Range {
  uint32_t first;
  uint32_t last;
};

// Characters that Unicode 9 did not know and that have a combining class or take part in a composition since. The
// reference normalizes by Unicode 9, the vocabularies were used with it, so these stay where they are: each is a border
// that nothing crosses. utf8proc 2.8 is at Unicode 15; the blocks of Unicode 16 are here for later ones.
constexpr Range kInert[] = {
    {0x7FD, 0x7FD},     {0x897, 0x89F},     {0x8CA, 0x8D3},     {0x9FE, 0x9FE},     {0xC3C, 0xC3C},
    {0xD3B, 0xD3C},     {0xEBA, 0xEBA},     {0x1715, 0x1715},   {0x1ABF, 0x1ACE},   {0x1DF6, 0x1DFA},
    {0xA82C, 0xA82C},   {0x105C0, 0x105FF}, {0x10D24, 0x10D27}, {0x10D69, 0x10D6D}, {0x10EAB, 0x10EAC},
    {0x10EFC, 0x10EFF}, {0x10F46, 0x10F50}, {0x10F82, 0x10F85}, {0x11070, 0x11070}, {0x1133B, 0x1133B},
    {0x11380, 0x113FF}, {0x1145E, 0x1145E}, {0x11839, 0x1183A}, {0x11930, 0x11930}, {0x11935, 0x11935},
    {0x11938, 0x11938}, {0x1193D, 0x1193E}, {0x11943, 0x11943}, {0x119E0, 0x119E0}, {0x11A34, 0x11A34},
    {0x11A47, 0x11A47}, {0x11A99, 0x11A99}, {0x11D42, 0x11D42}, {0x11D44, 0x11D45}, {0x11D97, 0x11D97},
    {0x11F41, 0x11F42}, {0x16100, 0x1613F}, {0x16D40, 0x16D7F}, {0x16FF0, 0x16FF1}, {0x1E08F, 0x1E08F},
    {0x1E130, 0x1E136}, {0x1E2AE, 0x1E2AE}, {0x1E2EC, 0x1E2EF}, {0x1E4EC, 0x1E4EF}, {0x1E5EE, 0x1E5EF}};

bool is_inert(uint32_t code_point) {
  if (code_point < kInert[0].first) return false;
  const Range* after = std::upper_bound(std::begin(kInert), std::end(kInert), code_point,
                                        [](uint32_t c, const Range& range) { return c < range.first; });
  return after != std::begin(kInert) && code_point <= std::prev(after)->last;
}

struct Mark {
  utf8proc_int32_t code_point;
  utf8proc_propval_t combining_class;
};

// The longest canonical decomposition of one character has 4 code points; the slack costs nothing.
constexpr int kMaxDecomposition = 16;

void append_decomposition(uint32_t code_point, std::vector<Mark>& marks) {
  utf8proc_int32_t parts[kMaxDecomposition];
  int last_boundclass = 0;
  const utf8proc_ssize_t num_parts =
      utf8proc_decompose_char(static_cast<utf8proc_int32_t>(code_point), parts, kMaxDecomposition,
                              static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_DECOMPOSE), &last_boundclass);
  for (utf8proc_ssize_t i = 0; i < std::min<utf8proc_ssize_t>(num_parts, kMaxDecomposition); ++i) {
    marks.push_back({parts[i], utf8proc_get_property(parts[i])->combining_class});
  }
}

// Canonical ordering. utf8proc can do it, by swapping neighbours: a megabyte of combining marks would take hours.
void order_marks(std::vector<Mark>& marks) {
  for (auto run = marks.begin(); run != marks.end();) {
    if (run->combining_class == 0) {
      ++run;
      continue;
    }
    const auto end = std::find_if(run, marks.end(), [](const Mark& mark) { return mark.combining_class == 0; });
    std::stable_sort(run, end, [](const Mark& a, const Mark& b) { return a.combining_class < b.combining_class; });
    run = end;
  }
}

void append_composed(const std::vector<Mark>& marks, std::string& out) {
  std::vector<utf8proc_int32_t> code_points;
  code_points.reserve(marks.size());
  for (const Mark& mark : marks) code_points.push_back(mark.code_point);
  const utf8proc_ssize_t num_composed =
      utf8proc_normalize_utf32(code_points.data(), static_cast<utf8proc_ssize_t>(code_points.size()),
                               static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  for (utf8proc_ssize_t i = 0; i < num_composed; ++i) {
    append_utf8(static_cast<uint32_t>(code_points[static_cast<size_t>(i)]), out);
  }
}

}  // namespace

bool is_trivially_nfc(std::string_view text) noexcept {
  // 0xCC leads U+0300 and up.
  return std::none_of(text.begin(), text.end(), [](char byte) { return static_cast<uint8_t>(byte) >= 0xCC; });
}

std::string to_nfc(std::string_view text) {
  if (is_trivially_nfc(text)) return std::string(text);

  std::string composed;
  composed.reserve(text.size());
  std::vector<Mark> marks;  // the decomposition of the text since the last border
  const auto flush = [&] {
    if (marks.empty()) return;
    order_marks(marks);
    append_composed(marks, composed);
    marks.clear();
  };
  while (!text.empty()) {
    const int32_t length = std::max(utf8_sequence_bytes(text), 1);
    const uint32_t code_point = utf8_code_point(text, length);
    text.remove_prefix(static_cast<size_t>(length));
    if (is_inert(code_point)) {
      flush();
      append_utf8(code_point, composed);
    } else {
      append_decomposition(code_point, marks);
    }
  }
  flush();
  return composed;
}

}  // namespace compact::engine
