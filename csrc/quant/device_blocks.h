#pragma once

#include <cstdint>

namespace gptq {

// What the kernels of a device work on. They give each thread one row of the weight: everything per column is
// [column][n_rows], so that the rows of threads lie side by side.

/// A block of columns of the sweep, in sweep order. M is Factor::multipliers.
template <typename T>
struct SweptBlock {
  int64_t n_rows;
  int64_t n_columns;
  const T* multipliers;  ///< M of the block, from its first row and column on
  int64_t stride;        ///< from a row of M to the next
  const T* targets;      ///< weights plus the errors of all columns before the block
  const T* weights;
  T* errors;             ///< out: weight - quantized weight
  uint8_t* codes;        ///< out
  const T* pivots;       ///< [n_columns]
  const T* damping;      ///< [n_columns]: what was added to the diagonal of H
  const int64_t* order;  ///< [n_columns]: the column as stored
  int64_t group_size;    ///< columns as stored that share a scale
  const T* scales;       ///< [n_groups][n_rows]
  const T* zeros;        ///< [n_groups][n_rows]
  T max_code;
  T* losses;  ///< [n_rows]: e H eᵀ of each row; that of the columns is added
};

/// X M = S for a block of columns.
template <typename T>
struct SolvedBlock {
  int64_t n_rows;
  int64_t n_columns;
  const T* multipliers;  ///< M, from the first row and column of the block on
  int64_t stride;        ///< from a row of M to the next
  const T* targets;      ///< S
  T* negated;            ///< out: -X
};

/// Coordinate descent over the codes of a block of columns of one group.
template <typename T>
struct MovedBlock {
  int64_t n_rows;
  int64_t n_columns;
  const T* hessian;    ///< H of the block, from its first row and column on
  int64_t stride;      ///< from a row of H to the next
  const T* gradients;  ///< E Hd of the block's columns
  const T* damping;    ///< [n_columns]: the diagonal of Hd - H
  T* levels;           ///< code - zero
  T* errors;           ///< weight - quantized weight
  T* changes;          ///< out: what was added to the errors
  const T* scales;     ///< [n_rows], of the group
  const T* zeros;      ///< [n_rows], of the group
  T max_code;
  T* losses;  ///< [n_rows]: e H eᵀ of each row; what the moves change is added
};

/// The scale of one group, fitted by least squares.
template <typename T>
struct FittedGroup {
  int64_t n_rows;
  int64_t n_columns;
  const T* damping;    ///< [n_columns]: the diagonal of Hd - H
  const T* levels;     ///< code - zero
  const T* changes;    ///< what was added to the errors since the gradients were damped
  const T* gradients;  ///< E H of the group's columns, damped
  const T* products;   ///< levels H of the group's columns
  T* errors;           ///< weight - quantized weight; changed with the scale
  T* scales;           ///< [n_rows], of the group; changed where that lessens e Hd eᵀ
  T* losses;           ///< [n_rows]: what the step changes of e H eᵀ is added
};

/// All groups of a weight, for the search of scale_search_kernel.h.
template <typename T>
struct SearchedGroups {
  int64_t n_rows;
  int64_t n_columns;
  int64_t group_size;
  const T* weights;
  const T* importance;  ///< [n_columns], at least 0
  T max_code;
  bool symmetric;
  T* scales;  ///< [n_groups][n_rows]
  T* zeros;   ///< [n_groups][n_rows]
};

}  // namespace gptq
