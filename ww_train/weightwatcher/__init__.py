"""`WeightWatcher`: the interface of the library of that name (0.7.7) over this one.

    import ww_train as ww

    watcher = ww.WeightWatcher(model=model)
    details = watcher.analyze(plot=True, randomize=True)
    summary = watcher.get_summary(details)

Arguments, columns, layer ids and names of files are WeightWatcher's. Numbers are those of
`ww_train.measure`: `benchmarks/differences.md` says where they differ and why. Arguments that have no
meaning raise ValueError with the alternative.
"""

from ww_train.weightwatcher.watcher import WeightWatcher

__all__ = ["WeightWatcher"]
