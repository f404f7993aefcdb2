#include "buffer.h"

#include <cstdlib>
#include <new>
#include <vector>

namespace sepconv {
namespace {

constexpr int64_t kKeptBytes = int64_t{64} << 20;  // per thread that calls
constexpr size_t kKeptBlocks = 8;

struct Block {
  void* data;
  int64_t bytes;
};

struct KeptBlocks {
  std::vector<Block> blocks;
  int64_t bytes = 0;
  KeptBlocks() { blocks.reserve(kKeptBlocks); }
  ~KeptBlocks() {
    for (const Block& block : blocks) std::free(block.data);
  }
};

KeptBlocks& Kept() {
  thread_local KeptBlocks kept;
  return kept;
}

}  // namespace

Buffer::Buffer(int64_t bytes) : bytes_(RoundUp(bytes < 1 ? 1 : bytes, kBufferAlignment)) {
  KeptBlocks& kept = Kept();
  size_t best = kept.blocks.size();
  for (size_t i = 0; i < kept.blocks.size(); ++i) {
    const int64_t size = kept.blocks[i].bytes;
    // A block of more than twice the size stays for the call that needs it.
    if (size < bytes_ || size > 2 * bytes_ + 4096) continue;
    if (best == kept.blocks.size() || size < kept.blocks[best].bytes) best = i;
  }
  if (best < kept.blocks.size()) {
    data_ = kept.blocks[best].data;
    bytes_ = kept.blocks[best].bytes;
    kept.bytes -= bytes_;
    kept.blocks[best] = kept.blocks.back();
    kept.blocks.pop_back();
    return;
  }
  data_ = std::aligned_alloc(kBufferAlignment, static_cast<size_t>(bytes_));
  if (!data_) throw std::bad_alloc();
}

Buffer::~Buffer() {
  KeptBlocks& kept = Kept();
  if (bytes_ > kKeptBytes) {
    std::free(data_);
    return;
  }
  // The oldest go first.
  while (!kept.blocks.empty() &&
         (kept.blocks.size() == kKeptBlocks || kept.bytes + bytes_ > kKeptBytes)) {
    std::free(kept.blocks.front().data);
    kept.bytes -= kept.blocks.front().bytes;
    kept.blocks.erase(kept.blocks.begin());
  }
  kept.blocks.push_back({data_, bytes_});
  kept.bytes += bytes_;
}

}  // namespace sepconv
