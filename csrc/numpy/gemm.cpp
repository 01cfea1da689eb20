// tlkernels._numpy: the tile engine on its own, for its benchmark and its tests.
#include "numpy/binding.h"

namespace tlk::numpy {
namespace {

using Level = std::optional<std::string>;

struct Kind {
    Dtype dtype;
    int type;  // NumPy's number
};

Kind kind_of(const char* op, const std::string& dtype) {
    if (dtype == "float32") return {Dtype::float32, py::detail::npy_api::NPY_FLOAT_};
    if (dtype == "bfloat16") return {Dtype::bfloat16, py::detail::npy_api::NPY_USHORT_};
    if (dtype == "float16") return {Dtype::float16, 23};
    throw py::value_error(sentence(op, ": dtype is '", dtype, "'; expected 'float32', 'bfloat16' or 'float16'"));
}

// c = a b^T, into `c`. The arrays are matrices, or stacks of them; bfloat16 travels as uint16. Nothing but sizes is
// checked: nobody but the benchmark and the tests calls this.
void gemm(const py::object& a_, const py::object& b_, const py::object& c_, const std::string& dtype, bool a_across,
          bool b_across, bool symmetric, const std::string& map, float factor, const py::object& mean_,
          const py::object& offsets_, const Level& level) {
    const char* op = "gemm";
    const Kernels& k = table(level);
    const Kind kind = kind_of(op, dtype);
    const py::array a = contiguous(op, "a", a_, kind.type, dtype.c_str());
    const py::array b = contiguous(op, "b", b_, kind.type, dtype.c_str());
    py::array c = contiguous(op, "c", c_, kind.type, dtype.c_str());
    const bool ragged = !offsets_.is_none();
    const auto stacked = [](const py::array& t) { return t.ndim() == 3; };
    const auto size = [](const py::array& t, int back) { return int64_t(t.shape(t.ndim() - back)); };
    if (a.ndim() < 2 || a.ndim() > 3 || b.ndim() < 2 || b.ndim() > 3)
        throw py::value_error(
            sentence(op, ": a and b have ", a.ndim(), " and ", b.ndim(), " dimensions; expected 2 or 3"));
    Gemm g{};
    g.m = a_across ? size(a, 1) : size(a, 2);
    g.k = a_across ? size(a, 2) : size(a, 1);
    g.n = b_across ? size(b, 1) : size(b, 2);
    g.batch = stacked(b) ? b.shape(0) : 1;
    if ((b_across ? size(b, 2) : size(b, 1)) != g.k)
        throw py::value_error(sentence(op, ": b does not have the ", g.k, " products of a along its inner side"));
    py::array offsets, mean;
    int64_t rows = g.m * (stacked(a) ? int64_t(a.shape(0)) : 1);
    if (ragged) {
        offsets = contiguous(op, "offsets", offsets_, py::detail::npy_api::NPY_INT64_, "int64");
        g.offsets = static_cast<const int64_t*>(offsets.data());
        if (a_across || stacked(a) || offsets.size() != g.batch + 1 || g.offsets[0] != 0 || g.offsets[g.batch] != g.m)
            throw py::value_error(sentence(op, ": offsets do not cut the ", g.m, " rows of a into ", g.batch));
        for (int64_t i = 0; i < g.batch; ++i)
            if (g.offsets[i + 1] < g.offsets[i]) throw py::value_error(sentence(op, ": offsets are not ascending"));
    } else if ((stacked(a) ? int64_t(a.shape(0)) : 1) != g.batch) {
        throw py::value_error(sentence(op, ": a and b are not as many matrices"));
    }
    if (c.size() != rows * g.n)
        throw py::value_error(sentence(op, ": c has ", c.size(), " elements; expected ", rows * g.n));
    if (!c.writeable()) throw py::value_error(sentence(op, ": c is read-only; expected a writable array"));
    if ((g.batch > 1 || ragged || symmetric || map != "plain") && a_across != b_across)
        throw py::value_error(sentence(op, ": mixed layouts are for single plain products"));
    if (map != "plain" && kind.dtype != Dtype::float32) throw py::value_error(sentence(op, ": maps are for float32"));
    if (symmetric && (g.m != g.n || g.batch != 1 || ragged))
        throw py::value_error(sentence(op, ": a symmetric product has one square result"));
    g.a = a.data();
    g.b = b.data();
    g.c = c.mutable_data();
    g.a_stride = size(a, 1);
    g.b_stride = size(b, 1);
    g.a_across = a_across;
    g.b_across = b_across;
    g.symmetric = symmetric;
    g.factor = factor;
    if (map == "squared")
        g.map = Gemm::squared;
    else if (map == "scaled")
        g.map = Gemm::scaled;
    else if (map == "shifted")
        g.map = Gemm::shifted;
    else if (map != "plain")
        throw py::value_error(sentence(op, ": map is '", map, "'"));
    if (g.map == Gemm::shifted) {
        mean = contiguous(op, "mean", mean_, py::detail::npy_api::NPY_FLOAT_, "float32");
        if (mean.size() < g.a_stride || mean.size() < g.b_stride)
            throw py::value_error(sentence(op, ": mean has ", mean.size(), " elements; expected one for each column"));
        g.mean = static_cast<const float*>(mean.data());
    }
    launch([&](Parallel parallel) { k.gemm(g, kind.dtype, parallel); });
}

}  // namespace

void bind_gemm(py::module_& m) {
    using py::arg;
    m.def("gemm", &gemm, arg("a"), arg("b"), arg("c"), py::kw_only(), arg("dtype") = "float32", arg("a_across") = false,
          arg("b_across") = false, arg("symmetric") = false, arg("map") = "plain", arg("factor") = 1.f,
          arg("mean") = py::none(), arg("offsets") = py::none(), arg("level") = py::none());
}

}  // namespace tlk::numpy
