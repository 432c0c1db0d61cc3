"""What the package is made of: public names, and imports that go one way."""

import ast
import pathlib
import re

import ebm_ppl

PACKAGE = pathlib.Path(ebm_ppl.__file__).parent
DOCS = PACKAGE.parent / "docs"
# Maths at the bottom, hosts at the edge: a module may import only from those before it.
ORDER = [
    "errors",
    "snapshot",
    "supports",
    "weights",
    "resampling",
    "kernels",
    "geometry",
    "cubature",
    "annealing",
    "fingerprint",
    "certificate",
    "pointwise",
    "guard",
    "discrete",
    "distribution",
    "integrand",
    "exact",
    "arguments",
    "model",
    "inspection",
    "placement",
    "drift",
    "edges",
    "poles",
    "reach",
    "evidence",
    "bridge",
    "normalizer",
    "normalized",
    "walkers",
    "sampling",
    "training",
    "optimizers",
    "jarzynski",
    "score",
    "generator",
    "vera",
    "refinement",
    "names",
    "groups",
    "arviz",
    "plots",
]
NUMPYRO_MODULES = {
    "supports",
    "geometry",
    "fingerprint",
    "guard",
    "discrete",
    "distribution",
    "integrand",
    "model",
    "inspection",
    "placement",
    "edges",
    "normalized",
    "walkers",
    "sampling",
    "jarzynski",
    "generator",
    "vera",
    "refinement",
    "arviz",
}


def imports_of(module):
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names.add(node.module)
    return names


def test_every_module_has_a_place():
    found = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert found == set(ORDER)


def test_imports_go_one_way():
    for place, module in enumerate(ORDER):
        internal = {
            name.removeprefix("ebm_ppl.")
            for name in imports_of(module)
            if name.startswith("ebm_ppl")
        }
        assert internal <= set(ORDER[:place]), (
            f"{module} imports {sorted(internal - set(ORDER[:place]))}"
        )


def test_hosts_are_known_to_few_modules():
    users = {
        module
        for module in ORDER
        if any(name.split(".")[0] == "numpyro" for name in imports_of(module))
    }
    assert users == NUMPYRO_MODULES
    for host in ("arviz", "xarray"):
        users = {
            module
            for module in ORDER
            if any(name.split(".")[0] == host for name in imports_of(module))
        }
        assert users == {"arviz"}


def test_public_names_are_pinned():
    assert ebm_ppl.__all__ == [
        "MALA",
        "ULA",
        "VERA",
        "EnergyDistribution",
        "Fit",
        "HMCScore",
        "ImportanceScore",
        "Jarzynski",
        "JarzynskiState",
        "LogNormalizer",
        "NonFiniteError",
        "UncertifiedNormalizerError",
        "UnknownNormalizerError",
        "VERAState",
        "VariationalScore",
        "Walkers",
        "latent_model",
        "log_normalizer",
        "multinomial",
        "normalized",
        "plot_energies",
        "plot_energy_surface",
        "plot_training",
        "sample",
        "standardized_normal",
        "systematic",
        "to_arviz",
    ]
    for name in ebm_ppl.__all__:
        assert getattr(ebm_ppl, name).__doc__


def test_every_public_name_has_a_docs_entry():
    documented = set(
        re.findall(r"auto\w+:: (\w+)", (DOCS / "api.md").read_text(encoding="utf-8"))
    )
    assert documented >= set(ebm_ppl.__all__)
