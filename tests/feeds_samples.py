"""One or more synthetic lines of every format that liqlab reads, shared by the tests of feeds."""

import json


def frame(**fields):
    """Return a Binance forceOrder frame; `fields` replace those of its order."""
    order = {
        "s": "BTCUSDT",
        "S": "SELL",
        "o": "LIMIT",
        "f": "IOC",
        "q": "0.200",
        "p": "60000.0",
        "ap": "60100.5",
        "X": "FILLED",
        "l": "0.100",
        "z": "0.150",
        "T": 1_700_000_000_000,
    }
    return {"e": "forceOrder", "E": order["T"] + 5, "o": order | fields}


def lines(*messages):
    """Return messages as JSON lines."""
    return "\n".join(json.dumps(message, separators=(",", ":")) for message in messages)


_MS = 1_700_000_000_000
_BITMEX = {"orderID": "a1-b2", "symbol": "XBTUSD", "side": "Sell", "price": 60000.5, "leavesQty": 1500}
_RECORDER = f"BTCUSDT,SELL,LIMIT,IOC,0.2,60000.0,60100.5,FILLED,0.1,0.15,{_MS}"

SAMPLES = {
    "binance": lines(frame(), frame(S="BUY", T=_MS + 1)),
    "binance combined": lines({"stream": "!forceOrder@arr", "data": frame(T=_MS + 2)}),
    "binance array": lines([frame(T=_MS + 3), frame(T=_MS + 4)]),
    "binance coin-m": lines(frame(s="BTCUSD_PERP", z="3", T=_MS + 5), frame(s="ETHUSD_PERP", z="3", st=2, T=_MS + 5)),
    "binance rest": lines(
        [
            {
                "symbol": "BTCUSDT",
                "price": "60000",
                "origQty": "0.2",
                "executedQty": "0.15",
                "averagePrice": "60100.5",
                "status": "FILLED",
                "timeInForce": "IOC",
                "type": "LIMIT",
                "side": "SELL",
                "time": _MS + 6,
            }
        ]
    ),
    "binance archive": (
        "time,side,order_type,time_in_force,original_quantity,price,average_price,order_status,last_fill_quantity,"
        f"accumulated_fill_quantity\n{_MS},BUY,LIMIT,IOC,7,60000,60100.5,FILLED,7,7"
    ),
    "binance recorder": f"{_RECORDER},9015.0\nETH,BUY,LIMIT,IOC,1,3000,None,FILLED,1,1,{_MS},3000,x",
    "bybit pre-v5": lines(
        {
            "topic": "liquidation.BTCUSDT",
            "data": {"symbol": "BTCUSDT", "side": "Sell", "price": "60000", "qty": "0.1", "time": _MS},
        }
    ),
    "bybit v5": lines(
        {
            "topic": "liquidation.BTCUSD",
            "type": "snapshot",
            "ts": _MS,
            "data": {"updatedTime": _MS, "symbol": "BTCUSD", "side": "Buy", "size": "2400", "price": "60000"},
        }
    ),
    "bybit all": lines(
        {
            "topic": "allLiquidation.BTCUSDT",
            "type": "snapshot",
            "ts": _MS,
            "data": [{"T": _MS, "s": "BTCUSDT", "S": "Buy", "v": "0.1", "p": "60000"}] * 2,
        }
    ),
    "bybit wrapped": lines(
        {"t": _MS, "d": [{"updatedTime": _MS - 9, "symbol": "BTCUSDT", "side": "Buy", "size": "1", "price": "60000"}]},
        {"t": _MS, "d": []},
    ),
    "okx": lines(
        {
            "arg": {"channel": "liquidation-orders", "instType": "SWAP"},
            "data": [
                {
                    "details": [
                        {"bkLoss": "0", "bkPx": "60000", "posSide": "long", "side": "sell", "sz": "8", "ts": str(_MS)},
                        {"bkLoss": "0", "bkPx": "60010", "posSide": "short", "side": "buy", "sz": "2", "ts": str(_MS)},
                    ],
                    "instFamily": "BTC-USDT",
                    "instId": "BTC-USDT-SWAP",
                    "instType": "SWAP",
                    "uly": "BTC-USDT",
                }
            ],
        }
    ),
    "bitmex": lines({"table": "liquidation", "action": "insert", "data": [_BITMEX]}),
    "bitmex raw": f"{_MS / 1000}: " + lines({"table": "liquidation", "action": "insert", "data": [_BITMEX]}),
    "deribit": lines(
        {
            "jsonrpc": "2.0",
            "method": "subscription",
            "params": {
                "channel": "trades.BTC-PERPETUAL.raw",
                "data": [
                    {
                        "trade_id": f"t{flag}",
                        "timestamp": _MS,
                        "price": 60000.0,
                        "instrument_name": "BTC-PERPETUAL",
                        "direction": "sell",
                        "amount": 1200,
                        **({"liquidation": flag} if flag else {}),
                    }
                    for flag in ("T", "M", "MT", "")
                ],
            },
        }
    ),
    "gate": lines(
        {
            "channel": "futures.public_liquidates",
            "event": "update",
            "time": _MS // 1000,
            "result": [{"price": "60000", "size": "-124", "time_ms": _MS, "contract": "BTC_USDT"}],
        }
    ),
    "gate rest": lines(
        [
            {
                "contract": "BTC_USDT",
                "left": 0,
                "size": 165,
                "fill_price": "60000",
                "order_price": "60100",
                "time": 1_700_000_000,
            }
        ]
    ),
    "htx": lines(
        {
            "op": "notify",
            "topic": "public.ETH-USDT.liquidation_orders",
            "ts": _MS,
            "data": [
                {
                    "contract_code": "ETH-USDT",
                    "direction": "buy",
                    "volume": 500,
                    "price": 3000.0,
                    "created_at": _MS,
                    "amount": 5,
                },
                {"contract_code": "ETH-USDT", "direction": "sell", "volume": 300, "price": 3000.0, "created_at": _MS},
            ],
        }
    ),
    "bitfinex": lines(
        [
            907,
            [["pos", 14, _MS, None, "tETHF0:USTF0", -4.5, 3000.0, None, 0, 1, None, 3010.5]],
            12,
            _MS,
            "liquidations",
        ],
        [907, [["pos", 15, _MS, None, "tBTCF0:USTF0", 0.5, 60000.0, None, 1, 1, None, 60010.5]], 13, _MS],
        [907, "hb"],
    ),
    "kraken": lines(
        *(
            {
                "feed": "trade",
                "product_id": product,
                "uid": f"u-{product}-{kind}",
                "side": "sell",
                "type": kind,
                "seq": 7,
                "time": _MS,
                "qty": 1200,
                "price": 60000.0,
            }
            for product in ("PI_XBTUSD", "PF_XBTUSD")
            for kind in ("liquidation", "fill")
        )
    ),
    "dydx": lines(
        {
            "type": "channel_data",
            "channel": "v4_trades",
            "id": "BTC-USD",
            "contents": {
                "trades": [
                    {
                        "id": f"01{kind}",
                        "side": "SELL",
                        "size": "0.5",
                        "price": "60000",
                        "type": kind,
                        "createdAt": "2023-11-14T22:13:20.500Z",
                    }
                    for kind in ("LIQUIDATED", "LIMIT")
                ]
            },
        }
    ),
    "bitget": lines(
        {
            "action": "update",
            "arg": {"instType": "usdt-futures", "topic": "liquidation"},
            "data": [{"symbol": "BTCUSDT", "side": "buy", "price": "60000", "amount": "1200", "ts": str(_MS)}],
            "ts": _MS,
        }
    ),
    "hyperliquid": lines(
        {
            "channel": "userFills",
            "data": {
                "user": "0xAB",
                "fills": [
                    {
                        "coin": "BTC",
                        "px": "60000",
                        "sz": "0.1",
                        "side": "A",
                        "time": _MS,
                        "tid": 5 + at,
                        **({"liquidation": {"liquidatedUser": user, "markPx": "1"}} if user else {}),
                    }
                    for at, user in enumerate(("0xab", "0xcd", ""))
                ],
            },
        }
    ),
    "tardis csv": (
        "exchange,symbol,timestamp,local_timestamp,id,side,price,amount\n"
        f"binance-futures,BTCUSDT,{_MS}123,{_MS}999,,sell,60000,0.15\nbybit,BTCUSD,{_MS}000,{_MS}999,,buy,60000,1200\n"
        f"okex-swap,BTC-USDT-SWAP,{_MS}000,{_MS}999,,buy,60000,12"
    ),
    "tardis json": lines(
        {
            "type": "liquidation",
            "symbol": "BTCUSD",
            "exchange": "bybit",
            "price": 60000.0,
            "amount": 1200,
            "side": "sell",
            "timestamp": "2023-11-14T22:13:20.000Z",
            "localTimestamp": "2023-11-14T22:13:20.123Z",
        }
    ),
    "cryptofeed": lines(
        *(
            {
                "exchange": exchange,
                "symbol": "BTC-USDT-PERP",
                "side": "buy",
                "quantity": 0.5,
                "price": 60000.0,
                "id": None,
                "status": "filled",
                "timestamp": 1_700_000_000.829,
                "receipt_timestamp": 1_700_000_001.0,
            }
            for exchange in ("BINANCE_FUTURES", "BYBIT")
        )
    ),
    "ccxt": lines(
        {
            "info": {},
            "symbol": "BTC/USDT:USDT",
            "timestamp": _MS,
            "datetime": "x",
            "price": 60000.0,
            "contracts": 12.0,
            "contractSize": 0.01,
            "side": "sell",
        }
    ),
    "history": (
        "Event Time (IST),Liquidation Type,Price,Quantity,Limit Executed Quantity,Market Executed Quantity\n"
        "2024-12-14 00:04:48.114000+05:30,Short Trade,102127.24,0.003,0.003,0.0"
    ),
    "table": "exchange,symbol,side,qty,price,event_ts\nokx,BTCUSDT,long,30,60000,1700000000000",
    "liqlab": f"ts_ms,exchange,symbol,side,price,size,notional\n{_MS},okx,BTC-USDT-SWAP,sell,60000.0,0.5,30000.0",
    "control": lines(
        {"result": None, "id": 1},
        {"event": "subscribe", "arg": {"channel": "liquidation-orders"}},
        {"op": "pong"},
        {"ping": _MS},
    )
    + "\npong",
}
