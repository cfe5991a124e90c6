#include "scratch.h"

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sk {

namespace {

struct Buffer {
    char* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
};
thread_local Buffer buffer;

constexpr size_t kPage = 4096;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kKeptBytes = size_t{64} << 20;

void use_huge_pages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
    // It may be refused, and is only advice.
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

struct Block {
    void* data;
    size_t size;
};

// Freed blocks, the newest last. Its lock is only tried: in a process that was forked while another
// thread held it, it stays locked.
class Pool {
    static constexpr size_t kMost = 128;  // so many of 4 MiB are the limit, too

    std::mutex mutex_;
    std::vector<Block> blocks_;
    size_t size_ = 0;
    std::atomic<size_t> limit_{size_t{512} << 20};

    void trim(size_t size, size_t count) {
        while (size_ > size || blocks_.size() > count) {
            std::free(blocks_.front().data);
            size_ -= blocks_.front().size;
            blocks_.erase(blocks_.begin());
        }
    }

public:
    Pool() { blocks_.reserve(kMost); }

    void shrink(size_t size) {
        const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
        if (lock) trim(size, kMost);
    }
    void set_limit(size_t limit) {
        limit_ = limit;
        shrink(limit);
    }

    // The smallest that `size` bytes fill to seven eighths at least; else {nullptr, 0}.
    Block take(size_t size) {
        const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
        if (!lock) return {nullptr, 0};
        auto best = blocks_.end();
        for (auto it = blocks_.begin(); it != blocks_.end(); ++it) {
            const bool fits = size <= it->size && it->size / 8 * 7 <= size;
            if (fits && (best == blocks_.end() || it->size < best->size)) best = it;
        }
        if (best == blocks_.end()) return {nullptr, 0};
        const Block found = *best;
        blocks_.erase(best);
        size_ -= found.size;
        return found;
    }

    // The oldest go back to the system where there are too many.
    void give(Block block) {
        const size_t limit = limit_;
        const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
        if (!lock || block.size > limit) return std::free(block.data);
        trim(limit - block.size, kMost - 1);
        blocks_.push_back(block);
        size_ += block.size;
    }
};

// Never destroyed: tensors may be freed later.
Pool& pool() {
    static Pool& only = *new Pool;
    return only;
}

// What `allocate` returns, if need be after the pool has given back all that it has.
template <class Allocate>
void* allocated(const Allocate& allocate) {
    void* data = allocate();
    if (data) return data;
    pool().shrink(0);
    data = allocate();
    if (!data) throw std::bad_alloc();
    return data;
}

constexpr size_t kLine = 64;

}  // namespace

// Taken from malloc as it is and aligned inside: an aligned allocation of glibc before 2.38 does
// not fit the gap that one of the same size has left.
Memory::Memory(size_t bytes) {
    const Block block = pool().take(bytes);
    allocated_ = block.data;
    capacity_ = block.size;
    if (allocated_) return;
    capacity_ = bytes;
    allocated_ = allocated([&] { return std::malloc(bytes + kLine); });
    use_huge_pages(data(), bytes);
}

Memory::~Memory() { pool().give({allocated_, capacity_}); }

void Memory::keep(size_t bytes) { pool().set_limit(bytes); }

uint8_t* Memory::data() const {
    const uintptr_t aligned = (reinterpret_cast<uintptr_t>(allocated_) + kLine - 1) / kLine * kLine;
    return reinterpret_cast<uint8_t*>(aligned);
}

void* scratch(size_t bytes) {
    if (bytes > buffer.size) {
        std::free(buffer.data);
        buffer.data = nullptr;
        buffer.size = 0;
        const size_t page = bytes < kHugePage ? kPage : kHugePage;
        const size_t rounded = (bytes + page - 1) / page * page;
        void* const data = allocated([&] { return std::aligned_alloc(page, rounded); });
        buffer.data = static_cast<char*>(data);
        // A tile is read at random: in small pages, most reads would miss the first-level TLB.
        if (page == kHugePage) use_huge_pages(buffer.data, rounded);
        buffer.size = rounded;
    }
    return buffer.data;
}

void trim_scratch() {
    if (buffer.size <= kKeptBytes) return;
    std::free(buffer.data);
    buffer.data = nullptr;
    buffer.size = 0;
}

}  // namespace sk
