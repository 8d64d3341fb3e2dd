#include "caches.hpp"

#include <algorithm>
#include <cstring>
#include <limits>

namespace l2a::core {
namespace {

constexpr std::size_t kMostViews = 64;
constexpr double kCountable = 0x1p62;  // of all buffers, whose sizes are then far from overflow

bool is_zero(const std::byte* data, std::size_t bytes) noexcept {
    return bytes == 0 || (*data == std::byte{0} && std::memcmp(data, data + 1, bytes - 1) == 0);
}

std::uintptr_t up(std::uintptr_t bytes, std::uintptr_t page) noexcept {
    return (bytes + page - 1) / page * page;
}

bool huge() {
    static const bool found = has_huge_pages();
    return found;
}

// Chunks from one on are so long at least.
void longer(std::vector<std::int64_t>& chunks, std::int64_t first, std::int64_t count, std::int64_t tokens) {
    const auto start = chunks.begin() + first;
    std::transform(start, start + count, start, [&](std::int64_t known) { return std::max(known, tokens); });
}

}  // namespace

Caches::Caches(const std::vector<const Graph*>& graphs) {
    for (const Graph* graph : graphs) {
        for (const CacheInput& cache : graph->caches()) {
            Buffer& buffer = buffers_[{cache.layer, cache.is_key}];
            if (buffer.groups > 0 && buffer.type != cache.type) {
                bundle_error(graph->path() + ": its input " + cache.past +
                             " has another type than that of a graph before it; export it again");
            }
            buffer.type = cache.type;
            buffer.groups = std::max(buffer.groups, cache.groups);
            buffer.token_bytes = cache.head_dim * static_cast<std::int64_t>(element_bytes(cache.type));
        }
    }
    for (const auto& [place, buffer] : buffers_) {
        token_bytes_ += buffer.groups * buffer.token_bytes;
        written_[place];
    }
}

std::size_t Caches::Buffer::size(std::int64_t rows, std::int64_t capacity) const noexcept {
    return up(static_cast<std::size_t>(rows * groups * capacity * token_bytes), kPage);
}

std::int64_t Caches::grown(std::int64_t capacity) const noexcept {
    return capacity <= capacity_ ? capacity_ : std::max(capacity, capacity_ * 3 / 2);
}

double Caches::bytes_for(std::int64_t rows, std::int64_t capacity) const noexcept {
    return static_cast<double>(std::max(rows, rows_)) * static_cast<double>(grown(capacity)) *
           static_cast<double>(token_bytes_);
}

std::byte* Caches::at(const Buffer& buffer, std::int64_t row, std::int64_t group) const noexcept {
    return buffer.data + (row * buffer.groups + group) * capacity_ * buffer.token_bytes;
}

void Caches::reserve(std::int64_t rows, std::int64_t capacity, const std::vector<std::int64_t>& lengths) {
    if (rows <= rows_ && capacity <= capacity_) return;
    Caches next({});
    next.rows_ = std::max(rows, rows_);
    next.capacity_ = grown(capacity);
    const double wanted = bytes_for(rows, capacity);
    std::size_t total = 0;
    if (wanted < kCountable) {
        for (const auto& [place, old] : buffers_) total += old.size(next.rows_, next.capacity_);
        next.data_ = zeroed(total);
    }
    if (!next.data_ && wanted > 0) {
        throw Error(L2A_ERROR_OUT_OF_MEMORY, std::to_string(static_cast<std::int64_t>(std::min(wanted, 9e18))) +
                                                 " bytes for keys and values are not there; free some, or lower the "
                                                 "limits");
    }
    std::byte* free = next.data_.get();
    for (const auto& [place, old] : buffers_) {
        Buffer& buffer = next.buffers_[place];
        buffer = old;
        buffer.data = free;
        next.written_[place].resize(static_cast<std::size_t>(next.rows_ * old.groups));
        free += old.size(next.rows_, next.capacity_);
        std::int64_t row = 0;
        for (const std::int64_t length : lengths) {
            for (std::int64_t group = 0; group < old.groups; ++group) {
                const auto chunk = static_cast<std::size_t>(row * old.groups + group);
                const std::int64_t tokens = std::min(written_[place][chunk], length);
                const auto bytes = static_cast<std::size_t>(tokens * old.token_bytes);
                const std::byte* written = at(old, row, group);
                // A layer that is skipped is not written: its new pages stay untouched too.
                if (!is_zero(written, bytes)) std::memcpy(next.at(buffer, row, group), written, bytes);
                next.written_[place][chunk] = tokens;
            }
            ++row;
        }
    }
    views_.clear();
    buffers_ = std::move(next.buffers_);
    written_ = std::move(next.written_);
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
    for (auto& [place, chunks] : written_) chunks.clear();
}

void Caches::trim(const std::vector<std::int64_t>& lengths) {
    Written kept = written_;
    for (auto& [place, chunks] : kept) {
        const auto groups = static_cast<std::size_t>(buffers_.at(place).groups);
        for (std::size_t chunk = 0; chunk < chunks.size(); ++chunk) {
            const std::int64_t length = chunk / groups < lengths.size() ? lengths[chunk / groups] : 0;
            chunks[chunk] = std::min(chunks[chunk], length);
        }
    }
    std::uintptr_t free = start();
    bool given = true;
    const std::uintptr_t end = begun(rows_, capacity_, free, kept, [&](std::uintptr_t first, std::uintptr_t last) {
        given = give_back(free, first) && given;
        free = last;
    });
    if (give_back(free, end) && given) written_ = std::move(kept);
}

template <typename Each>
std::uintptr_t Caches::begun(std::int64_t rows, std::int64_t capacity, std::uintptr_t start, const Written& written,
                             Each&& each) const {
    std::uintptr_t end = start;
    for (const auto& [place, buffer] : buffers_) end += buffer.size(rows, capacity);
    const std::uintptr_t low = up(start, kHugePage);
    const std::uintptr_t high = huge() ? end / kHugePage * kHugePage : low;  // between them all pages are huge
    std::uintptr_t counted = start;                                          // all before it is
    std::uintptr_t base = start;
    for (const auto& [place, buffer] : buffers_) {
        const auto stride = static_cast<std::uintptr_t>(capacity * buffer.token_bytes);
        std::uintptr_t first = base;
        for (const std::int64_t tokens : written.at(place)) {
            const std::uintptr_t last = first + static_cast<std::uintptr_t>(tokens * buffer.token_bytes);
            if (tokens > 0) {
                const std::uintptr_t from = first >= low && first < high ? first / kHugePage * kHugePage : first;
                const std::uintptr_t to = last > low && last < high ? up(last, kHugePage) : last;
                if (to > counted) each(std::max(from, counted), to);
                counted = std::max(to, counted);
            }
            first += stride;
        }
        base += buffer.size(rows, capacity);
    }
    return end;
}

std::int64_t Caches::taken(std::int64_t rows, std::int64_t capacity, std::uintptr_t start,
                           const Written& written) const {
    std::uintptr_t found = 0;
    begun(rows, capacity, start, written, [&](std::uintptr_t first, std::uintptr_t last) { found += last - first; });
    return static_cast<std::int64_t>(found);
}

std::uintptr_t Caches::start() const noexcept {
    return reinterpret_cast<std::uintptr_t>(data_.get());
}

std::int64_t Caches::held() const {
    const std::int64_t counted = taken(rows_, capacity_, start(), written_);
    return huge() ? std::min(counted, resident(data_)) : counted;
}

std::int64_t Caches::unwritten(const std::vector<Extent>& extents) const {
    std::int64_t capacity = capacity_;
    for (const Extent& extent : extents) capacity = std::max(capacity, grown(extent.tokens));
    const std::int64_t rows = std::max(rows_, static_cast<std::int64_t>(extents.size()));
    if (!(bytes_for(rows, capacity) < kCountable)) return std::numeric_limits<std::int64_t>::max();
    const bool anew = rows > rows_ || capacity > capacity_;
    Written wanted;
    for (const auto& [place, buffer] : buffers_) {
        if (anew) wanted[place].resize(static_cast<std::size_t>(rows * buffer.groups));
        else wanted[place] = written_.at(place);
    }
    std::int64_t row = 0;
    for (const Extent& extent : extents) note(wanted, *extent.graph, row++, extent.tokens);
    if (anew) return taken(rows, capacity, 0, wanted);
    return taken(rows, capacity, start(), wanted) - held();
}

void Caches::mark(const Graph& graph, std::int64_t row, std::int64_t tokens) {
    note(written_, graph, row, tokens);
}

// That the first groups of a row, as many as a graph has, are so long at least.
void Caches::note(Written& written, const Graph& graph, std::int64_t row, std::int64_t tokens) const {
    for (const CacheInput& cache : graph.caches()) {
        const Place place{cache.layer, cache.is_key};
        longer(written.at(place), row * buffers_.at(place).groups, cache.groups, tokens);
    }
}

void Caches::copy(std::int64_t source, std::int64_t target, std::int64_t tokens) {
    for (const auto& [place, buffer] : buffers_) {
        const std::int64_t* from = written_.at(place).data() + source * buffer.groups;
        std::int64_t* to = written_.at(place).data() + target * buffer.groups;
        for (std::int64_t group = 0; group < buffer.groups; ++group) {
            const std::int64_t count = std::min(tokens, from[group]);
            to[group] = std::max(to[group], count);
            std::memcpy(at(buffer, target, group), at(buffer, source, group),
                        static_cast<std::size_t>(count * buffer.token_bytes));
        }
    }
}

void Caches::swap(std::int64_t one, std::int64_t other, std::int64_t tokens) {
    for (const auto& [place, buffer] : buffers_) {
        std::int64_t* its = written_.at(place).data() + one * buffer.groups;
        std::int64_t* others = written_.at(place).data() + other * buffer.groups;
        for (std::int64_t group = 0; group < buffer.groups; ++group) {
            const std::int64_t count = std::min(tokens, std::max(its[group], others[group]));
            its[group] = std::max(its[group], count);
            others[group] = std::max(others[group], count);
            std::byte* first = at(buffer, one, group);
            std::swap_ranges(first, first + count * buffer.token_bytes, at(buffer, other, group));
        }
    }
}

}  // namespace l2a::core
