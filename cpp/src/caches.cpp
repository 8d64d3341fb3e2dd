#include "caches.hpp"

#include <algorithm>
#include <cstring>

namespace l2a::core {
namespace {

constexpr std::size_t kMostViews = 64;

bool is_zero(const std::byte* data, std::size_t bytes) noexcept {
    return bytes == 0 || (*data == std::byte{0} && std::memcmp(data, data + 1, bytes - 1) == 0);
}

}  // namespace

Caches::Caches(const std::vector<const Graph*>& graphs) {
    for (const Graph* graph : graphs) {
        for (const CacheInput& cache : graph->caches()) {
            Buffer& buffer = buffers_[{cache.layer, cache.is_key}];
            buffer.groups = std::max(buffer.groups, cache.groups);
            buffer.token_bytes = cache.head_dim * static_cast<std::int64_t>(element_bytes(cache.type));
        }
    }
    for (const auto& [place, buffer] : buffers_) token_bytes_ += buffer.groups * buffer.token_bytes;
}

void Caches::Buffer::mark(std::int64_t row, std::int64_t count, std::int64_t tokens) noexcept {
    for (std::int64_t group = 0; group < count; ++group) {
        marks[place(row, group)] = std::max(marks[place(row, group)], tokens);
    }
}

std::int64_t Caches::grown(std::int64_t capacity) const noexcept {
    return capacity <= capacity_ ? capacity_ : std::max(capacity, capacity_ * 3 / 2);
}

std::int64_t Caches::bytes_for(std::int64_t rows, std::int64_t capacity) const noexcept {
    return std::max(rows, rows_) * grown(capacity) * token_bytes_;
}

std::byte* Caches::at(const Buffer& buffer, std::int64_t row, std::int64_t group) const noexcept {
    return buffer.data + (row * buffer.groups + group) * capacity_ * buffer.token_bytes;
}

void Caches::reserve(std::int64_t rows, std::int64_t capacity, const std::vector<std::int64_t>& lengths) {
    if (rows <= rows_ && capacity <= capacity_) return;
    Caches next({});
    next.rows_ = std::max(rows, rows_);
    next.capacity_ = grown(capacity);
    const auto size = [&](const Buffer& buffer) {  // of whole pages, for those of a layer to be its own
        const auto bytes = static_cast<std::size_t>(next.rows_ * buffer.groups * next.capacity_ * buffer.token_bytes);
        return (bytes + kPage - 1) / kPage * kPage;
    };
    std::size_t total = 0;
    for (const auto& [place, old] : buffers_) total += size(old);
    next.data_ = zeroed(total);
    if (!next.data_ && total > 0) {
        throw Error(L2A_ERROR_OUT_OF_MEMORY, std::to_string(total) +
                                                 " bytes for keys and values are not there; free some, or lower the "
                                                 "limits");
    }
    std::byte* free = next.data_.get();
    for (const auto& [place, old] : buffers_) {
        Buffer& buffer = next.buffers_[place];
        buffer = {old.groups, old.token_bytes, free, {}};
        buffer.marks.resize(static_cast<std::size_t>(next.rows_ * old.groups));
        free += size(old);
        std::int64_t row = 0;
        for (const std::int64_t length : lengths) {
            const auto bytes = static_cast<std::size_t>(length * old.token_bytes);
            for (std::int64_t group = 0; group < old.groups; ++group) {
                const std::byte* written = at(old, row, group);
                // A layer that is skipped is not written: its new pages stay untouched too.
                if (!is_zero(written, bytes)) std::memcpy(next.at(buffer, row, group), written, bytes);
                buffer.marks[old.place(row, group)] = std::min(old.marks[old.place(row, group)], length);
            }
            ++row;
        }
    }
    views_.clear();
    buffers_ = std::move(next.buffers_);
    data_ = std::move(next.data_);
    rows_ = next.rows_;
    capacity_ = next.capacity_;
}

const OrtValues& Caches::view(const Graph& graph, std::int64_t start, std::int64_t count) {
    const auto key = std::make_tuple(&graph, start, count);
    const auto known = views_.find(key);
    if (known != views_.end()) return known->second;
    if (views_.size() >= kMostViews) views_.clear();
    OrtValues values;
    for (const CacheInput& cache : graph.caches()) {
        const Buffer& buffer = buffers_.at({cache.layer, cache.is_key});
        if (count > 1 && buffer.groups != cache.groups) {
            throw Error(L2A_ERROR_INTERNAL, graph.path() + ": reads fewer groups than the rows have");
        }
        values.push_back(graph.view(cache, at(buffer, start, 0), count, capacity_));
    }
    return views_[key] = std::move(values);
}

void Caches::clear() noexcept {
    views_.clear();
    data_.reset();
    rows_ = capacity_ = 0;
}

void Caches::mark(const Graph& graph, std::int64_t row, std::int64_t tokens) {
    for (const CacheInput& cache : graph.caches()) {
        buffers_.at({cache.layer, cache.is_key}).mark(row, cache.groups, tokens);
    }
}

std::int64_t Caches::unwritten(const Graph& graph, std::int64_t row, std::int64_t tokens) const {
    std::int64_t bytes = 0;
    for (const CacheInput& cache : graph.caches()) {
        const Buffer& buffer = buffers_.at({cache.layer, cache.is_key});
        for (std::int64_t group = 0; group < cache.groups; ++group) {
            const std::int64_t known = row >= 0 && row < rows_ ? buffer.marks[buffer.place(row, group)] : 0;
            bytes += std::max<std::int64_t>(0, tokens - known) * buffer.token_bytes;
        }
    }
    return bytes;
}

void Caches::copy(std::int64_t source, std::int64_t target, std::int64_t tokens) {
    for (auto& [place, buffer] : buffers_) {
        buffer.mark(target, buffer.groups, tokens);
        for (std::int64_t group = 0; group < buffer.groups; ++group) {
            std::memcpy(at(buffer, target, group), at(buffer, source, group),
                        static_cast<std::size_t>(tokens * buffer.token_bytes));
        }
    }
}

void Caches::swap(std::int64_t one, std::int64_t other, std::int64_t tokens) {
    for (auto& [place, buffer] : buffers_) {
        buffer.mark(one, buffer.groups, tokens);
        buffer.mark(other, buffer.groups, tokens);
        for (std::int64_t group = 0; group < buffer.groups; ++group) {
            std::byte* first = at(buffer, one, group);
            std::swap_ranges(first, first + tokens * buffer.token_bytes, at(buffer, other, group));
        }
    }
}

}  // namespace l2a::core
