// Runs the bodies of the CUDA kernels (csrc/cuda/*.cuh) on the CPU, one thread after another, with the indices and the
// shared memory that they have on a device.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "hd.cuh"

namespace hecate {

// The order in which the emulated blocks and threads run. A body that does not race gives the same bits in each.
enum class ThreadOrder { kAscending, kDescending, kShuffled };

struct LaunchShape {
  i64 blocks;
  int width, height;  // threads of a block
  std::size_t shared_bytes;
};

inline std::vector<i64> order_of(i64 count, ThreadOrder order) {
  std::vector<i64> numbers(count);
  std::iota(numbers.begin(), numbers.end(), i64{0});
  if (order == ThreadOrder::kDescending) std::reverse(numbers.begin(), numbers.end());
  if (order == ThreadOrder::kShuffled) std::shuffle(numbers.begin(), numbers.end(), std::mt19937_64(count));
  return numbers;
}

class HostBlock {
 public:
  HostBlock(const LaunchShape& shape, ThreadOrder order)
      : shape_(shape), threads_(order_of(i64{shape.width} * shape.height, order)),
        shared_(new u8[shape.shared_bytes]) {}  // exactly this size, so that sanitizers see an access beyond it

  // Shared memory is undefined when a block starts.
  void begin(i64 index) {
    index_ = index;
    std::memset(shared_.get(), 0xcd, shape_.shared_bytes);
  }

  i64 index() const { return index_; }
  i64 count() const { return shape_.blocks; }
  int width() const { return shape_.width; }
  int height() const { return shape_.height; }
  int threads() const { return shape_.width * shape_.height; }
  u8* shared() const { return shared_.get(); }
  void sync() const {}
  void fence() const {}
  void pause() const { std::this_thread::sleep_for(std::chrono::microseconds(20)); }  // others need the core
  void fail() const {}  // the launcher raises
  i64 nanoseconds() const {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
  }
  template <typename Body>
  void run(Body body) const {
    for (i64 thread : threads_) body(static_cast<int>(thread % shape_.width), static_cast<int>(thread / shape_.width));
  }

 private:
  LaunchShape shape_;
  i64 index_ = 0;
  std::vector<i64> threads_;
  std::unique_ptr<u8[]> shared_;
};

// Runs kernel `Kernel` with the arguments at `args`.
template <typename Kernel>
void emulate(const void* args, const LaunchShape& shape, ThreadOrder order) {
  typename Kernel::Args values;
  std::memcpy(&values, args, sizeof(values));
  HostBlock block(shape, order);
  for (i64 index : order_of(shape.blocks, order)) {
    block.begin(index);
    Kernel::run(values, block);
  }
}

}  // namespace hecate
