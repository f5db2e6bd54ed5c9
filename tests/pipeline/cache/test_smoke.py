def test_x(tiny_cache):
    from tests.pipeline.caches import files

    for k, v in files(tiny_cache.url).items():
        print(k, len(v))
