// Keys and values of all rows of an engine, by the layers of the dense model: the graphs of a bundle read and write the
// same buffers, so a row that changes its graph is not copied.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "graph.hpp"
#include "pages.hpp"

namespace l2a::core {

// A buffer is [rows, groups, capacity, head_dim] of a layer's keys or values. Pages that nothing was written to take no
// memory: layers that are skipped without keys and values stay empty. Those that are begun are taken whole, and most of
// them are huge: where a group's tokens are less than that, those of its neighbours come with it.
class Caches {
  public:
    // What a row is to hold.
    struct Extent {
        const Graph* graph = nullptr;
        std::int64_t tokens = 0;
    };

    // Room for what any of the graphs reads. Throws Error (bundle) where their caches differ in type.
    explicit Caches(const std::vector<const Graph*>& graphs);

    [[nodiscard]] std::int64_t rows() const noexcept { return rows_; }
    [[nodiscard]] std::int64_t capacity() const noexcept { return capacity_; }
    [[nodiscard]] std::int64_t bytes() const noexcept { return rows_ * capacity_ * token_bytes_; }
    // Bytes of all buffers once there is room for so many rows of so many tokens.
    [[nodiscard]] double bytes_for(std::int64_t rows, std::int64_t capacity) const noexcept;
    // Makes room. Of the first rows, whose lengths are given, the tokens stay; what else is there does not. Throws
    // Error (out of memory), and all is as it was.
    void reserve(std::int64_t rows, std::int64_t capacity, const std::vector<std::int64_t>& lengths);
    // Rows [start, start + count) as a graph reads them; ends with the next reserve. A graph with fewer groups than the
    // buffers can read one row at a time: its groups are the first ones of each row.
    const OrtValues& view(const Graph& graph, std::int64_t start, std::int64_t count);
    // Notes that a graph is writing the first tokens of a row.
    void mark(const Graph& graph, std::int64_t row, std::int64_t tokens);
    // Bytes of memory that what was written holds: where the system had no huge pages for it, what it was given.
    [[nodiscard]] std::int64_t held() const;
    // Bytes that the first rows will take beyond what is held, until they are as long as given. Where buffers must grow
    // for it, what rows hold is there twice for a moment. INT64_MAX where that is more than integers hold.
    [[nodiscard]] std::int64_t unwritten(const std::vector<Extent>& extents) const;
    // Gives back the memory of all but the first tokens of the first rows.
    void trim(const std::vector<std::int64_t>& lengths);
    // Gives all rows back.
    void clear() noexcept;
    // Copies the first tokens of a row over another row, as far as they were written: of layers that a row does not have,
    // what another row left there may stay. Nobody reads it before it is written anew.
    void copy(std::int64_t source, std::int64_t target, std::int64_t tokens);
    // Exchanges the first tokens of two rows, as far as one of them was written.
    void swap(std::int64_t one, std::int64_t other, std::int64_t tokens);

  private:
    struct Buffer {
        ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
        std::int64_t groups = 0;
        std::int64_t token_bytes = 0;  // of one group
        std::byte* data = nullptr;

        // Bytes, of whole pages, for those of a layer to be its own.
        [[nodiscard]] std::size_t size(std::int64_t rows, std::int64_t capacity) const noexcept;
    };
    using Place = std::pair<std::int64_t, bool>;                 // layer, whether keys
    using Written = std::map<Place, std::vector<std::int64_t>>;  // [rows, groups]: most tokens that were ever written

    std::map<Place, Buffer> buffers_;
    Written written_;
    Pages data_;  // of all of them
    std::int64_t rows_ = 0;
    std::int64_t capacity_ = 0;
    std::int64_t token_bytes_ = 0;  // of one row in all layers
    std::map<std::tuple<const Graph*, std::int64_t, std::int64_t>, OrtValues> views_;

    [[nodiscard]] std::int64_t grown(std::int64_t capacity) const noexcept;
    // Calls `each` with where the memory of what is written begins and ends, ascending, in buffers of so many rows of so
    // many tokens, one behind another from `start`. Returns where they end.
    template <typename Each>
    std::uintptr_t begun(std::int64_t rows, std::int64_t capacity, std::uintptr_t start, const Written& written,
                         Each&& each) const;
    // Bytes of it.
    [[nodiscard]] std::int64_t taken(std::int64_t rows, std::int64_t capacity, std::uintptr_t start,
                                     const Written& written) const;
    void note(Written& written, const Graph& graph, std::int64_t row, std::int64_t tokens) const;
    [[nodiscard]] std::uintptr_t start() const noexcept;  // of the buffers
    [[nodiscard]] std::byte* at(const Buffer& buffer, std::int64_t row, std::int64_t group) const noexcept;
};

}  // namespace l2a::core
