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
// memory: layers that are skipped without keys and values stay empty.
class Caches {
  public:
    // Room for what any of the graphs reads.
    explicit Caches(const std::vector<const Graph*>& graphs);

    [[nodiscard]] std::int64_t rows() const noexcept { return rows_; }
    [[nodiscard]] std::int64_t capacity() const noexcept { return capacity_; }
    [[nodiscard]] std::int64_t bytes() const noexcept { return rows_ * capacity_ * token_bytes_; }
    // Bytes of all buffers once there is room for so many rows of so many tokens.
    [[nodiscard]] std::int64_t bytes_for(std::int64_t rows, std::int64_t capacity) const noexcept;
    // Makes room. Of the first rows, whose lengths are given, the tokens stay; what else is there does not. Throws
    // Error (out of memory), and all is as it was.
    void reserve(std::int64_t rows, std::int64_t capacity, const std::vector<std::int64_t>& lengths);
    // Rows [start, start + count) as a graph reads them; ends with the next reserve. A graph with fewer groups than the
    // buffers can read one row at a time: its groups are the first ones of each row.
    const OrtValues& view(const Graph& graph, std::int64_t start, std::int64_t count);
    // Notes that a graph is writing the first tokens of a row.
    void mark(const Graph& graph, std::int64_t row, std::int64_t tokens);
    // Bytes that so many tokens of a graph will take beyond what was ever written of a row; -1: of a new one.
    [[nodiscard]] std::int64_t unwritten(const Graph& graph, std::int64_t row, std::int64_t tokens) const;
    // Gives all rows back.
    void clear() noexcept;
    // Copies the first tokens of a row over another row.
    void copy(std::int64_t source, std::int64_t target, std::int64_t tokens);
    // Exchanges the first tokens of two rows.
    void swap(std::int64_t one, std::int64_t other, std::int64_t tokens);

  private:
    struct Buffer {
        std::int64_t groups = 0;
        std::int64_t token_bytes = 0;  // of one group
        std::byte* data = nullptr;
        std::vector<std::int64_t> marks;  // [rows, groups]: most tokens that were ever written

        [[nodiscard]] std::size_t place(std::int64_t row, std::int64_t group) const noexcept {
            return static_cast<std::size_t>(row * groups + group);
        }
        // Of the first groups.
        void mark(std::int64_t row, std::int64_t count, std::int64_t tokens) noexcept;
    };
    using Place = std::pair<std::int64_t, bool>;  // layer, whether keys

    std::map<Place, Buffer> buffers_;
    Pages data_;  // of all of them
    std::int64_t rows_ = 0;
    std::int64_t capacity_ = 0;
    std::int64_t token_bytes_ = 0;  // of one row in all layers
    std::map<std::tuple<const Graph*, std::int64_t, std::int64_t>, OrtValues> views_;

    [[nodiscard]] std::int64_t grown(std::int64_t capacity) const noexcept;
    [[nodiscard]] std::byte* at(const Buffer& buffer, std::int64_t row, std::int64_t group) const noexcept;
};

}  // namespace l2a::core
