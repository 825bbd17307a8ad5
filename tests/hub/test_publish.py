"""A run published to the loopback Hub: what is sent, what the card says, what comes back in another process."""
import timm_amf


def test_try(client, hub, runs, capsys):
    run = runs('amf')
    url = timm_amf.publish(run, 'org/birds', 'apache-2.0')
    print(url)
    print(hub.files('org/birds')['README.md'].decode())
    for n in ('config.json', 'args.yaml', 'plan.yaml', 'metrics.json'):
        print(hub.files('org/birds')[n].decode())
    m = timm_amf.load('org/birds')
    print(m.provenance)
    assert 0
