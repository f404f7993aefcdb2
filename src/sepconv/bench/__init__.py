"""Times this library against everyone, on layers of published networks: `sepconv bench`.

Every engine runs in a process of its own, so that no thread pool disturbs another one's turn and
Keras can run on each backend. `run.measure` is the whole measurement, `results` what comes out of
it, `report` how it is shown. Importing any of them imports no framework: only the processes do.
"""
