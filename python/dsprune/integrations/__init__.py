"""Group learning inside other libraries' training loops. Each module needs its library:

- ``dsprune.integrations.lightning``: a callback for Lightning's ``Trainer``
- ``dsprune.integrations.accelerate``: a learner for loops written with Accelerate
- ``dsprune.integrations.transformers``: a callback for the ``Trainer`` of ``transformers``
"""
