"""The software bill of materials of a bundle: CycloneDX 1.6, of the tools that compiled it and the models in it.

Hides the CycloneDX library. No clock and no chance: the serial number is derived from the content, so the same compile gives the
same bytes.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, metadata
from typing import Any

from appliance.bundle import canonical

_SPACE = uuid.UUID("5b1c2f0e-6d0a-5b3e-9c55-2f6c1d0b8a47")  # of the serial numbers; any fixed value would do


@dataclass(frozen=True)
class Model:
    """One model in the bill. `sha256` is of the trained file; `graphs` maps a path in the bundle to its digest."""

    name: str
    version: str
    task: str
    sha256: str
    graphs: Mapping[str, str] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)  # `licence` and `data` are taken from it


def licence_of(package: str) -> str:
    """What the package's own metadata says, an SPDX expression where it has one; empty where it says nothing."""
    try:
        found = metadata(package)
    except PackageNotFoundError:
        return ""
    for expression in found.get_all("License-Expression") or []:
        return str(expression)
    classified = [c.rpartition(" :: ")[2] for c in found.get_all("Classifier") or [] if c.startswith("License :: ")]
    return "; ".join(classified) or "".join(found.get_all("License") or []).partition("\n")[0][:100]


def make(name: str, spinebox: str, tools: Mapping[str, str], models: Iterable[Model]) -> bytes:
    """The bill as JSON. `tools` maps package names to versions."""
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output import make_outputter
    from cyclonedx.schema import OutputFormat, SchemaVersion

    def licences(text: str) -> list[Any]:
        """An SPDX id or expression where the text is one, else a name."""
        return [LicenseFactory().make_from_string(text)] if text else []

    def hashes(sha256: str) -> list[HashType]:
        return [HashType(alg=HashAlgorithm.SHA_256, content=sha256)]

    def package(tool: str, version: str) -> Component:
        found = licences(licence_of(tool))
        return Component(type=ComponentType.LIBRARY, name=tool, version=version, bom_ref=f"pkg:pypi/{tool}@{version}", licenses=found)

    components = [package(tool, version) for tool, version in sorted(tools.items())]
    for m in sorted(models, key=lambda m: m.name):
        said = [Property(name="spinebox:task", value=m.task)]
        if m.card.get("data"):
            said.append(Property(name="spinebox:training-data", value=_text(m.card["data"])))
        components.append(
            Component(
                type=ComponentType.MACHINE_LEARNING_MODEL,
                name=m.name,
                version=m.version,
                bom_ref=f"model:{m.name}",
                hashes=hashes(m.sha256),
                licenses=licences(_text(m.card.get("licence", ""))),
                properties=said,
                components=[
                    Component(type=ComponentType.FILE, name=path, bom_ref=f"model:{m.name}:{path}", hashes=hashes(digest))
                    for path, digest in sorted(m.graphs.items())
                ],
            )
        )
    subject = Component(type=ComponentType.FIRMWARE, name=name, version=spinebox, bom_ref=f"bundle:{name}")
    bom = Bom(components=components, metadata=BomMetaData(component=subject))
    bom.register_dependency(subject, components)
    document: dict[str, Any] = json.loads(make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string())
    document["metadata"].pop("timestamp", None)
    document.pop("serialNumber", None)
    document["serialNumber"] = f"urn:uuid:{uuid.uuid5(_SPACE, canonical(document).decode())}"
    return canonical(document)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else canonical(value).decode()
