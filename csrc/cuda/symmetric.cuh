// Rows that the devices of a node read from each other's memory, and the flags by which they say when.
//
// A flag is an 8-byte word that only grows and that one device writes. `signal` sets flags after everything that was
// launched before it on its stream; what is launched after `await` sees what the signalling devices had written by then.
#pragma once

#include "hd.cuh"

namespace hecate {

constexpr int kFlags = 128;        // per launch
constexpr int kPulls = 128;        // per launch
constexpr i64 kPullBytes = 65536;  // bytes that a block copies at a time

struct SignalArgs {
  i64 count;
  i64 flag[kFlags];   // addresses
  i64 value[kFlags];  // larger than what the flags have
};

struct Signal {
  using Args = SignalArgs;

  template <typename Block>
  static HECATE_HD void run(const Args& a, Block& block) {
    block.run([&](int x, int) {
      if (x < a.count) store_release(reinterpret_cast<i64*>(a.flag[x]), a.value[x]);
    });
  }
};

// Waits until every flag has at least its value. After `timeout_ns` it writes to `late` which flag is missing, plus one,
// and ends; on a GPU with an error, because what follows on the stream would read rows that are not there.
struct AwaitArgs {
  i64 count;
  i64 timeout_ns;
  i64* late;
  i64 flag[kFlags];
  i64 value[kFlags];
};

struct Await {
  using Args = AwaitArgs;

  template <typename Block>
  static HECATE_HD void run(const Args& a, Block& block) {
    block.run([&](int x, int) {
      if (x >= a.count) return;
      const i64 begin = block.nanoseconds();
      while (load_acquire(reinterpret_cast<const i64*>(a.flag[x])) < a.value[x]) {
        if (block.nanoseconds() - begin > a.timeout_ns) {
          *a.late = x + 1;
          block.fail();
          return;
        }
        block.pause();
      }
    });
  }
};

// target[i][0 : bytes[i]] = source[i][0 : bytes[i]]
struct PullArgs {
  i64 count;
  i64 source[kPulls];  // addresses, also of other devices
  i64 target[kPulls];
  i64 bytes[kPulls];
};

struct Pull {
  using Args = PullArgs;

  static HECATE_HD i64 pieces(i64 bytes) { return (bytes + kPullBytes - 1) / kPullBytes; }

  template <typename Block>
  static HECATE_HD void run(const Args& a, Block& block) {
    i64 pull = 0, first = 0;  // `first`: pieces of the pulls before
    for (i64 unit = block.index();; unit += block.count()) {
      while (pull < a.count && unit >= first + pieces(a.bytes[pull])) first += pieces(a.bytes[pull++]);
      if (pull == a.count) return;
      const i64 begin = (unit - first) * kPullBytes, size = smaller(kPullBytes, a.bytes[pull] - begin);
      const u8* source = reinterpret_cast<const u8*>(a.source[pull]) + begin;
      u8* target = reinterpret_cast<u8*>(a.target[pull]) + begin;
      const bool aligned = (a.source[pull] | a.target[pull]) % kVectorBytes == 0;
      block.run([&](int x, int) {
        each_column<kVectorBytes, 8>(
            size, aligned, x, block.threads(),
            [&](i64 i) { store<kVectorBytes>(target + i, load<kVectorBytes>(source + i)); },
            [&](i64 i) { target[i] = source[i]; });
      });
    }
  }
};

#ifdef __CUDACC__
// Few blocks with many threads: the number of processors that they take from compute is stated by the launcher.
#define HECATE_PULL_KERNEL(name, ...) HECATE_BOUNDED_KERNEL((512, 1), name, __VA_ARGS__)
#endif

#define HECATE_SYMMETRIC(ENTRY)   \
  ENTRY(signal, hecate::Signal)   \
  ENTRY(await, hecate::Await)     \
  ENTRY(pull, hecate::Pull)

}  // namespace hecate
