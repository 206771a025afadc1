#include "library.h"

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"
#include "layout.h"
#include "pack.h"

namespace {

thread_local std::string last_error;

int fail(std::string what) {
  last_error = std::move(what);
  return -1;
}

bool is_format(int format) {
  return format >= static_cast<int>(owl::Format::packed32) && format <= static_cast<int>(owl::Format::dense8);
}

struct Free {
  void operator()(std::byte* bytes) const { ::operator delete[](bytes, std::align_val_t{owl::kAlignment}); }
};

// Items of a stage, in order, to whichever thread is free; all threads meet between stages.
class Team {
 public:
  Team(const owl::Kernels& kernels, const owl::Product& product, int threads)
      : kernels_(kernels), product_(product), threads_(threads) {}

  void run(int repeats) {
    std::vector<std::thread> others;
    for (int i = 1; i < threads_; ++i) others.emplace_back([this, repeats] { work(repeats); });
    work(repeats);
    for (std::thread& other : others) other.join();
  }

 private:
  void work(int repeats) {
    for (int round = 0; round < repeats * owl::kStages; ++round) {
      const int stage = round % owl::kStages;
      const std::int64_t items = owl::stage_items(kernels_, *product_.weights, product_.tokens, stage);
      for (std::int64_t item; (item = next_.fetch_add(1)) < items;) kernels_.run(product_, stage, item);
      if (arrived_.fetch_add(1) + 1 == threads_ * (round + 1)) {
        next_.store(0);
        done_.store(round + 1);
      }
      while (done_.load() <= round) std::this_thread::yield();  // the one waited for may need this CPU
    }
  }

  const owl::Kernels& kernels_;
  const owl::Product& product_;
  int threads_;
  std::atomic<std::int64_t> next_{0};
  std::atomic<int> arrived_{0}, done_{0};
};

}  // namespace

int owl_abi() { return kOwlAbi; }

const char* owl_instruction_sets() {
  static const std::string names = [] {
    std::string all;
    for (const char* name : {"avx512", "avx2", "neon", "scalar"}) {
      if (owl::find_kernels(name) != nullptr) all += (all.empty() ? "" : ",") + std::string(name);
    }
    return all;
  }();
  return names.c_str();
}

std::int64_t owl_pack(const float* weights, std::int64_t rows, std::int64_t columns, int format, int paired,
                      std::uint8_t* out, std::int64_t capacity) {
  if (!is_format(format)) return fail("unknown weight format");
  const auto as = static_cast<owl::Format>(format);
  const auto r = static_cast<std::uint64_t>(rows), c = static_cast<std::uint64_t>(columns);
  const char* problem = nullptr;
  const auto most = static_cast<std::int64_t>(owl::most_bytes(r, c, as, paired != 0, problem));
  if (problem != nullptr) return fail(problem);
  if (out == nullptr) return most;
  if (capacity < most) return fail("no room for the packed matrix");
  const std::uint64_t bytes = owl::pack(weights, r, c, as, paired != 0, out, problem);
  return problem == nullptr ? static_cast<std::int64_t>(bytes) : fail(problem);
}

int owl_check(const std::uint8_t* data, std::int64_t size) {
  owl::Packed packed{};
  const char* problem = owl::parse(data, static_cast<std::size_t>(size), packed);
  return problem == nullptr ? 0 : fail(problem);
}

int owl_unpack(const std::uint8_t* data, std::int64_t size, float* weights, std::uint8_t* mask) {
  owl::Packed packed{};
  if (const char* problem = owl::parse(data, static_cast<std::size_t>(size), packed)) return fail(problem);
  owl::unpack(packed, weights, mask);
  return 0;
}

std::int64_t owl_product(const std::uint8_t* data, std::int64_t size, const float* x, float* y, std::int64_t tokens,
                         const char* kernels, int threads, int repeats) {
  owl::Packed packed{};
  if (const char* problem = owl::parse(data, static_cast<std::size_t>(size), packed)) return fail(problem);
  const owl::Kernels* chosen = owl::find_kernels(kernels);
  if (chosen == nullptr) return fail(std::string("this CPU has no kernels called ") + kernels);
  if (tokens < 1 || threads < 1 || repeats < 1) return fail("tokens, threads and repeats are at least 1");
  try {
    const std::size_t bytes = owl::scratch_bytes(*chosen, packed, tokens);
    const std::unique_ptr<std::byte[], Free> scratch(new (std::align_val_t{owl::kAlignment}) std::byte[bytes]);
    const owl::Product product{&packed, x, y, tokens, scratch.get()};
    const auto start = std::chrono::steady_clock::now();
    Team(*chosen, product, threads).run(repeats);
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start).count();
  } catch (const std::bad_alloc&) {
    return fail("not enough memory");
  }
}

const char* owl_error() { return last_error.c_str(); }
