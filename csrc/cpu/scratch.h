// Working memory that a thread keeps between calls, up to a limit: fresh pages cost more than the
// kernels that use them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sk {

// At least `bytes` bytes, aligned to 64, valid until this thread's next call. Throws
// std::bad_alloc.
void* scratch(size_t bytes);
// Gives back what is more than a thread may keep.
void trim_scratch();

// Memory of a large result. What was freed serves the next result of about its size, up to a limit:
// Linux zeroes what it hands out afresh, which can take as long as a product. It is in huge pages,
// because small ones fault one by one. Throws std::bad_alloc.
class Memory {
public:
    explicit Memory(size_t bytes);
    Memory(const Memory&) = delete;
    ~Memory();
    uint8_t* data() const;
    // Of what is freed, at most so many bytes.
    static void keep(size_t bytes);

private:
    void* allocated_;
    size_t capacity_;
};

// Hands out aligned pieces of one scratch buffer.
class Arena {
public:
    Arena() = default;
    Arena(const Arena&) = delete;
    ~Arena() { trim_scratch(); }
    template <class T>
    size_t reserve(int64_t count) {
        const size_t at = size_;
        size_ += (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
        return at;
    }
    void allocate() { base_ = static_cast<char*>(scratch(size_)); }
    template <class T>
    T* at(size_t offset) const {
        return reinterpret_cast<T*>(base_ + offset);
    }

private:
    size_t size_ = 0;
    char* base_ = nullptr;
};

}  // namespace sk
