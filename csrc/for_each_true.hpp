// Walks through rows of a placement.
#pragma once

#include <cstdint>
#include <cstring>

namespace hecate {

// Calls `visit(i)` for every true entry of a row, in ascending order. Most entries are false, so it skips whole words.
template <typename Visit>
void for_each_true(const bool* row, int size, Visit visit) {
  int i = 0;
  for (std::uint64_t word; i + 8 <= size; i += 8) {
    std::memcpy(&word, row + i, 8);
    for (int j = i; word != 0 && j < i + 8; ++j)
      if (row[j]) visit(j);
  }
  for (; i < size; ++i)
    if (row[i]) visit(i);
}

}  // namespace hecate
